"""Each part of ``optimize`` on real pipelines, together and alone; what does not fit is refused and changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from torch import Tensor

import stepdistill
from stepdistill.build import new_student
from stepdistill.inference import Parts, optimize
from stepdistill.inference.optimized import optimized_of
from stepdistill.inference.sampler import StudentSampler
from stepdistill.models.families import open_pipeline
from stepdistill.sampling import Ddim, Sampler, StepRule, Tcd, trailing
from stepdistill.stock import stock_scheduler
from tests.models.test_every_family import stirred
from tests.tiny import flux, pixart, sd, sd3, sdxl, wan

PROMPTS = ["a red star", "a blue ring"]
ROUNDING = 1e-5
"""Of images in [0, 1] by channels-last or compiled networks, float32; measured below 4e-6."""


def student(
    made: DiffusionPipeline, steps: int = 2, size: tuple[int, ...] | None = None, rule: StepRule | None = None
) -> DiffusionPipeline:
    """The pipeline with an untrained student's scheduler."""
    opened = open_pipeline(stirred(made), size=size)
    sampler = Sampler(trailing(steps), rule or Ddim())
    opened.pipeline.scheduler = stock_scheduler(new_student(opened, sampler), opened)
    return opened.pipeline


MAKERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": sd.pipeline, "sdxl": sdxl.pipeline, "sd3": sd3.pipeline, "flux": flux.pipeline, "pixart": pixart.pipeline,
}  # fmt: skip


@pytest.fixture(scope="module", params=MAKERS)
def pipe(request: pytest.FixtureRequest) -> DiffusionPipeline:
    """The five kinds that people sample most."""
    return student(MAKERS[request.param](), size=pixart.SIZE if request.param == "pixart" else None)


def drawn(pipe: DiffusionPipeline, **options: object) -> Tensor:
    return stepdistill.sample(pipe, PROMPTS, output="float", **options)


def assert_same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=ROUNDING)


def tiny_decoder(**changes: object) -> AutoencoderTiny:
    torch.manual_seed(0)
    config = {
        "latent_channels": 4, "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1),
    }  # fmt: skip
    return AutoencoderTiny(**config | changes).eval()


def test_all_of_it_together_makes_the_same_images(pipe: DiffusionPipeline) -> None:
    want = drawn(pipe)
    assert_same(drawn(pipe, optimize=True), want)
    assert optimized_of(pipe) is None  # for the time of the call
    with optimize(pipe):
        for _ in range(2):
            assert_same(drawn(pipe), want)
        assert_same(drawn(pipe, batch=1), want)
    assert torch.equal(drawn(pipe), want)


def test_channels_last_alone_makes_the_same_images(pipe: DiffusionPipeline) -> None:
    want = drawn(pipe)
    with optimize(pipe, cache_text=False):
        weight = pipe.vae.decoder.conv_in.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert_same(drawn(pipe), want)
    assert weight.is_contiguous()


@pytest.mark.parametrize("name", ["sd", "pixart", "flux"])
def test_compiled_networks_are_one_graph_for_all_prompts(name: str) -> None:
    """Traced without a break, and once: another prompt's keys are handed to the graph that is there.

    What a compiler makes of the graph is its own affair; here it is run as it is.
    """
    pipe = student(MAKERS[name](), size=pixart.SIZE if name == "pixart" else None)
    other = ["something else", "and more"]
    want, want_other = drawn(pipe), stepdistill.sample(pipe, other, output="float")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    with optimize(pipe, compile=True, backend="eager", channels_last=False):
        assert_same(drawn(pipe), want)
        assert_same(stepdistill.sample(pipe, other, output="float"), want_other)
    assert counters["unique_graphs"] == 2  # denoiser and decoder
    torch._dynamo.reset()


@pytest.mark.parametrize("maker", [sd.pipeline, sd3.pipeline])
def test_a_tiny_decoder_decodes_instead(maker: Callable[[], DiffusionPipeline], tmp_path: Path) -> None:
    """From a folder: the same images as the stock pipeline makes with it, latents scaled as it wants them."""
    pipe, tiny = student(maker()), tiny_decoder()
    tiny.save_pretrained(tmp_path / "tiny")
    before, own = drawn(pipe), pipe.vae
    pipe.vae = tiny
    want = drawn(pipe)
    pipe.vae = own
    with optimize(pipe, tiny_decoder=tmp_path / "tiny"):
        assert_same(drawn(pipe), want)
    assert pipe.vae is own and torch.equal(drawn(pipe), before)
    assert not torch.allclose(want, before, atol=0.01)
    assert_same(drawn(pipe, optimize=Parts(tiny_decoder=tiny)), want)


@pytest.mark.parametrize("rule", [Ddim(), Tcd(0.3)], ids=str)
def test_what_goes_into_a_cuda_graph_depends_on_its_buffers_alone(rule: StepRule, monkeypatch) -> None:
    """Without a GPU the graph is stood in for by its function, on the buffers that replays would see: recorded with one
    prompt, guidance and noise, it must make the next one's images, and not multiply any keys."""
    pipe, made, multiplied = student(sd.pipeline(), 4, rule=rule), [], []

    class Graph:
        def __init__(self, function: Callable[..., Tensor], given: list[Tensor]):
            self.function, self.buffers = function, [t.clone() for t in given]
            made.append(self)

        def __call__(self, given: list[Tensor]) -> Tensor:
            for buffer, tensor in zip(self.buffers, given, strict=True):
                buffer.copy_(tensor)
            multiplied.clear()
            return self.function(*self.buffers)

    monkeypatch.setattr("stepdistill.inference.sampler.CudaGraph", Graph)
    with optimize(pipe, channels_last=False) as optimized:
        want = [drawn(pipe), drawn(pipe, seed=3), stepdistill.sample(pipe, ["other", "text"], output="float")]
        guided = drawn(pipe, guidance=2.0)
        optimized._sampler = StudentSampler(pipe, optimized.kv, cuda_graph=True)
        for m in pipe.unet.modules():
            if getattr(m, "is_cross_attention", False):
                slot = m.to_k.forward
                slot.original = lambda x, own=slot.original: multiplied.append(1) or own(x)
        got = [drawn(pipe), drawn(pipe, seed=3), stepdistill.sample(pipe, ["other", "text"], output="float")]
        assert len(made) == 1 and not multiplied
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(drawn(pipe, guidance=2.0), guided) and len(made) == 2


def test_half_precision_stays_near() -> None:
    """States between steps stay in float32 here, and in the network's dtype in the stock pipeline."""
    pipe = student(sdxl.pipeline(), 4)
    exact = drawn(pipe)
    pipe.to(torch.bfloat16)
    stock, ours = drawn(pipe), drawn(pipe, optimize=True)
    assert ours.dtype == torch.float32
    assert 0 < (ours - exact).abs().mean() < 1.5 * (stock - exact).abs().mean()
    assert pipe.unet.dtype == pipe.vae.dtype == torch.bfloat16


def test_samples_do_not_depend_on_their_batch_and_buffers_are_kept() -> None:
    pipe = student(sd.pipeline(), 4)
    with optimize(pipe) as optimized:
        together = stepdistill.sample(pipe, PROMPTS, seed=4, output="float")
        alone = stepdistill.sample(pipe, PROMPTS[1:], seed=4, first=1, batch=1, output="float")
        assert_same(alone, together[1:])
        before = [optimized.sampler._buffers[n][0].data_ptr() for n in (1, 2)]
        stepdistill.sample(pipe, PROMPTS * 2, seed=5, batch=2, output="float")
        assert before == [optimized.sampler._buffers[n][0].data_ptr() for n in (1, 2)]


def test_teachers_are_optimised_but_have_no_few_step_loop() -> None:
    pipe = stirred(sd.pipeline())

    def called() -> Tensor:
        rng = torch.Generator().manual_seed(0)
        return pipe(PROMPTS, num_inference_steps=3, generator=rng, output_type="pt").images

    want = called()
    with optimize(pipe) as optimized:
        assert_same(called(), want)
        with pytest.raises(ValueError, match="is no exported student; export one with save_pipeline"):
            _ = optimized.sampler


REFUSED = {
    "twice": (lambda pipe: (optimize(pipe), optimize(pipe)), "is optimised already; call undo"),
    "unknown": (lambda pipe: optimize(pipe, chanels_last=True), "no part 'chanels_last'; parts are cache_text"),
    "mode": (lambda pipe: optimize(pipe, compile="fast"), "compile must be one of .* got 'fast'"),
    "graph": (lambda pipe: optimize(pipe, cuda_graph=True), "cuda_graph: the pipeline is on cpu; move it to a GPU"),
    "both graphs": (lambda pipe: optimize(pipe, cuda_graph=True, compile="max-autotune"), "both record CUDA graphs"),
    "channels": (
        lambda pipe: optimize(pipe, tiny_decoder=tiny_decoder(latent_channels=16)),
        "takes latents of 16 channels and enlarges 2 times; this pipeline's have 4 and need 2",
    ),
    "factor": (
        lambda pipe: optimize(
            pipe, tiny_decoder=tiny_decoder(decoder_block_out_channels=(8, 8, 8), num_decoder_blocks=(1, 1, 1))
        ),
        "enlarges 4 times",
    ),
    "no folder": (lambda pipe: optimize(pipe, tiny_decoder=Path("nowhere/at/all")), "tiny_decoder nowhere/at/all"),
    "steps": (lambda pipe: drawn(pipe, optimize=True, steps=3), "steps 3: this student was trained for 2"),
    "option": (lambda pipe: drawn(pipe, optimize=True, clip_skip=1), "clip_skip: the few-step loop takes no such"),
    "negatives": (
        lambda pipe: drawn(pipe, optimize=True, guidance=3.0, negative_prompt=["a", "b", "c"]),
        "negative_prompt: 3 for 2 samples",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_one_clear_line_and_changes_nothing(name: str) -> None:
    pipe = student(sd.pipeline())
    want = drawn(pipe)
    state = set(vars(pipe))
    act, says = REFUSED[name]
    with pytest.raises((ValueError, OSError), match=says) as error:
        act(pipe)
    assert "\n" not in str(error.value)
    if optimized_of(pipe) is not None:
        optimized_of(pipe).undo()
    assert set(vars(pipe)) == state and torch.equal(drawn(pipe), want)


def test_without_a_compiler_compiling_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    pipe = student(sd.pipeline())
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler such as g\+\+; install one, or leave compile out"):
        optimize(pipe, compile=True)
    assert optimized_of(pipe) is None


def test_a_decoder_of_videos_is_not_replaced() -> None:
    pipe = student(wan.pipeline(), size=wan.SIZE)
    with pytest.raises(ValueError, match=re.escape("AutoencoderTiny stands in for AutoencoderKL alone")):
        optimize(pipe, tiny_decoder=tiny_decoder())


def test_the_recorded_number_of_text_tokens_is_taken() -> None:
    """It is an argument of the stock call, and a pipeline that was loaded from a folder knows nothing of it."""
    bare = sd3.pipeline()
    config = bare.config
    bare.register_to_config(_max_sequence_length=5)
    pipe = student(bare)
    assert pipe.scheduler.config["_student"]["call"]["max_sequence_length"] == 5
    pipe._internal_dict = config
    want = drawn(pipe)
    assert_same(drawn(pipe, optimize=True), want)
    assert "_max_sequence_length" not in pipe.config


def test_guidance_of_another_form_is_refused() -> None:
    from tests.tiny import lumina2

    pipe = student(lumina2.pipeline())
    with pytest.raises(ValueError, match="the few-step loop does not guide lumina2; leave optimize out"):
        stepdistill.sample(pipe, "a", guidance=3.0, optimize=True)
