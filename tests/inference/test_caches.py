"""Prompts and their keys and values are computed once, and never stale."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor

from stepdistill.inference import Optimized, optimize
from stepdistill.inference.kv_cache import KVCache
from tests.models.test_every_family import stirred
from tests.tiny import pixart, sd, sd3

PROMPTS = ["a red star", "a blue ring"]


@pytest.fixture
def pipe() -> DiffusionPipeline:
    """A tiny Stable Diffusion."""
    return stirred(sd.pipeline())


@contextmanager
def calls(module: torch.nn.Module) -> Iterator[list[int]]:
    """One entry for each call."""
    seen: list[int] = []
    hook = module.register_forward_hook(lambda *given: seen.append(1))
    try:
        yield seen
    finally:
        hook.remove()


def drawn(pipe: DiffusionPipeline, prompts: object = PROMPTS, **options: object) -> Tensor:
    prompts = {"prompt": prompts} if isinstance(prompts, list) else {"prompt_embeds": prompts}
    rng = torch.Generator().manual_seed(1)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0} | options
    return pipe(**prompts, generator=rng, output_type="pt", **options).images


def key_projections(pipe: DiffusionPipeline) -> list[torch.nn.Module]:
    return [m.to_k for m in pipe.unet.modules() if getattr(m, "is_cross_attention", False)]


def test_keys_and_values_are_computed_once_for_a_prompt(pipe: DiffusionPipeline) -> None:
    with optimize(pipe, channels_last=False) as optimized:
        multiplied = []
        for layer in key_projections(pipe):
            slot = layer.forward
            slot.original = lambda x, own=slot.original: multiplied.append(1) or own(x)
        drawn(pipe)
        once = len(key_projections(pipe))
        assert len(multiplied) == once and optimized.kv.layers == 2 * once > 0
        drawn(pipe, num_inference_steps=4)
        assert len(multiplied) == once
        drawn(pipe, ["something else", "and more"])
        assert len(multiplied) == 2 * once


def test_teachers_with_guidance_are_cached_within_a_call(pipe: DiffusionPipeline) -> None:
    want = drawn(pipe, guidance_scale=4.0)
    with optimize(pipe, channels_last=False):
        assert torch.equal(drawn(pipe, guidance_scale=4.0), want)
        assert torch.equal(drawn(pipe, guidance_scale=4.0), want)


# What makes a cache stale. Each changes the images; the optimised pipeline must follow.


def edited(pipe: DiffusionPipeline) -> None:
    with torch.no_grad():
        key_projections(pipe)[0].weight.mul_(3)


def edited_behind_the_counter(pipe: DiffusionPipeline) -> None:
    """As peft merges adapters: the version counter stands still."""
    weight = key_projections(pipe)[0].weight
    version = weight._version
    weight.data += 0.5
    assert weight._version == version


def edited_encoder_behind_the_counter(pipe: DiffusionPipeline) -> None:
    for name, p in pipe.text_encoder.named_parameters():
        if name.endswith("v_proj.weight"):
            p.data += 0.3


def with_lora(pipe: DiffusionPipeline) -> None:
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_k", "to_v"], init_lora_weights=False))


def merged_and_gone(pipe: DiffusionPipeline) -> None:
    """A LoRA that was fused and unloaded leaves the very layers behind that were there, with other weights."""
    before = list(map(id, key_projections(pipe)))
    with_lora(pipe)
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    assert list(map(id, key_projections(pipe))) == before


def with_encoder_lora(pipe: DiffusionPipeline) -> None:
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    pipe.text_encoder.add_adapter(config)


def doubled(pipe: DiffusionPipeline) -> None:
    pipe.to(torch.float64)


def reloaded(pipe: DiffusionPipeline) -> None:
    state = pipe.unet.state_dict()
    pipe.unet.load_state_dict({k: 1.5 * v if "attn2.to_v" in k else v for k, v in state.items()})


CHANGES = [
    edited, edited_behind_the_counter, edited_encoder_behind_the_counter, with_lora, merged_and_gone, with_encoder_lora,
    doubled, reloaded,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_no_cache_outlives_what_it_was_computed_with(pipe: DiffusionPipeline, change: Callable) -> None:
    with optimize(pipe, channels_last=False) as optimized:
        before = drawn(pipe)
        change(pipe)
        after = drawn(pipe)
        again = drawn(pipe)
        optimized.undo()
        want = drawn(pipe)
    assert torch.equal(after, want) and torch.equal(again, want)
    assert not torch.equal(want.to(before.dtype), before)


def test_a_lora_is_switched_scaled_and_taken_out_again(pipe: DiffusionPipeline) -> None:
    bare = drawn(pipe)
    with optimize(pipe, channels_last=False):
        drawn(pipe)
        with_lora(pipe)
        adapted = drawn(pipe)
        assert not torch.allclose(adapted, bare)
        pipe.unet.disable_adapters()
        assert torch.equal(drawn(pipe), bare)
        pipe.unet.enable_adapters()
        assert torch.equal(drawn(pipe), adapted)
        half = drawn(pipe, cross_attention_kwargs={"scale": 0.5})
        assert torch.equal(drawn(pipe), adapted)
    assert torch.equal(drawn(pipe, cross_attention_kwargs={"scale": 0.5}), half)
    with optimize(pipe, channels_last=False):
        assert torch.equal(drawn(pipe), adapted)
        pipe.unet.unload_lora()
        assert torch.equal(drawn(pipe), bare)


def test_embeddings_that_are_written_to_are_other_embeddings(pipe: DiffusionPipeline) -> None:
    """The same tensor, the same storage: only its version tells."""
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 12, 16)
    with optimize(pipe, channels_last=False), torch.no_grad():
        before = pipe.unet(x, t, encoder_hidden_states=text)[0]
        text *= 2
        after = pipe.unet(x, t, encoder_hidden_states=text)[0]
    with torch.no_grad():
        assert torch.equal(after, pipe.unet(x, t, encoder_hidden_states=text)[0]) and not torch.equal(after, before)


@pytest.mark.parametrize("change", [edited, with_lora, reloaded], ids=lambda f: f.__name__)
def test_a_network_that_is_called_alone_follows_too(pipe: DiffusionPipeline, change: Callable) -> None:
    """Nobody encodes a prompt here, which is when weights are read."""
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 12, 16)
    with optimize(pipe, channels_last=False), torch.no_grad():
        pipe.unet(x, t, encoder_hidden_states=text)
        change(pipe)
        after = pipe.unet(x, t, encoder_hidden_states=text)[0]
    with torch.no_grad():
        assert torch.equal(after, pipe.unet(x, t, encoder_hidden_states=text)[0])


def test_memory_of_known_embeddings_is_not_used_again(pipe: DiffusionPipeline) -> None:
    """They are kept alive for as long as their keys are, so that no new tensor can come to lie where they were."""
    cache, x, t = KVCache(pipe.unet, entries=4), torch.randn(1, 4, 8, 8), torch.tensor(500)
    alive = []
    with torch.no_grad():
        for _ in range(6):
            text = torch.randn(1, 12, 16)
            pipe.unet(x, t, encoder_hidden_states=text)
            alive.append(weakref.ref(text))
            del text
    assert [ref() is not None for ref in alive] == [False] * 2 + [True] * 4
    cache.remove()


def test_returned_embeddings_may_be_written_to(pipe: DiffusionPipeline) -> None:
    want = drawn(pipe)
    with optimize(pipe, channels_last=False), torch.no_grad():
        drawn(pipe)
        with calls(pipe.text_encoder) as seen:  # the very arguments of the pipeline's call
            pipe.encode_prompt(PROMPTS, torch.device("cpu"), 1, False)[0].zero_()
        assert not seen
        assert torch.equal(drawn(pipe), want)


def test_arguments_of_encoding_count(pipe: DiffusionPipeline) -> None:
    want = drawn(pipe, num_images_per_prompt=2)
    with optimize(pipe, channels_last=False):
        assert len(drawn(pipe)) == 2
        assert torch.equal(drawn(pipe, num_images_per_prompt=2), want)


def test_gradients_are_as_without_caches(pipe: DiffusionPipeline) -> None:
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(500)
    layer = key_projections(pipe)[0]

    def gradient() -> Tensor:
        text = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
        pipe.unet(x, t, encoder_hidden_states=text)[0].square().sum().backward()
        found, layer.weight.grad = layer.weight.grad.clone(), None
        return found

    want = gradient()
    with optimize(pipe, channels_last=False):
        drawn(pipe)
        assert torch.equal(gradient(), want)


def test_everything_is_as_before_once_it_is_undone(pipe: DiffusionPipeline) -> None:
    want = drawn(pipe)
    before = set(vars(pipe)), {n: set(vars(m)) for n, m in pipe.unet.named_modules()}
    optimized: Optimized = optimize(pipe, compile=True, backend="eager")
    assert "forward" in vars(pipe.unet) and "encode_prompt" in vars(pipe)
    optimized.undo()
    optimized.undo()  # nothing is left to do
    assert before == (set(vars(pipe)), {n: set(vars(m)) for n, m in pipe.unet.named_modules()})
    assert torch.equal(drawn(pipe), want)
    with calls(pipe.text_encoder) as seen:
        drawn(pipe)
    assert seen


def test_what_an_mm_dit_makes_of_text_is_not_kept() -> None:
    """Its text stream depends on time: two steps with one prompt have different keys."""
    with optimize(stirred(sd3.pipeline())) as optimized:
        assert optimized.kv is None


def test_projected_captions_are_kept_too() -> None:
    """PixArt projects the caption anew in each call; what its attention reads is another tensor every time."""
    pipe = stirred(pixart.pipeline())
    call = {"height": 16, "width": 16, "use_resolution_binning": False}
    want = drawn(pipe, **call)
    with optimize(pipe, channels_last=False) as optimized:
        assert torch.equal(drawn(pipe, **call), want)
        assert optimized.kv.layers == 6
        with torch.no_grad():
            pipe.transformer.caption_projection.linear_1.weight.mul_(2)
        got = drawn(pipe, **call)
    assert torch.equal(got, drawn(pipe, **call)) and not torch.equal(got, want)
