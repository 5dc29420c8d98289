"""Negative prompts by attention: the formulas, and stock pipelines that heed them without guidance."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from stepdistill.steering import negative
from stepdistill.steering.away import Away, joint, nag, steered
from tests.tiny import dit, flux, pixart, sd, sd3, sdxl

FAMILIES = pytest.mark.parametrize("module", [sd, sdxl, pixart, sd3, flux], ids=lambda m: m.__name__)


def images(pipe, prompt="ab c", **call) -> Tensor:
    pipeline = getattr(pipe, "pipeline", pipe)
    pipeline.set_progress_bar_config(disable=True)
    if type(pipeline).__name__.startswith("PixArt"):
        call = {"height": 16, "width": 16, "use_resolution_binning": False, "clean_caption": False} | call
    call = {"num_inference_steps": 1, "output_type": "np", "generator": torch.Generator().manual_seed(0)} | call
    return torch.from_numpy(pipe(prompt, **call).images)


def test_nag_by_hand() -> None:
    towards, away = torch.tensor([[[[1.0, -1.0]], [[2.0, 0.0]]]]), torch.tensor([[[[0.0, 0.0]], [[-2.0, 4.0]]]])
    # Ze = (3, -3), (10, -8): length 24 against 4, so it is shortened to 2.5 x 4 = 10
    far = torch.tensor([[[[3.0, -3.0]], [[10.0, -8.0]]]]) * 10 / 24
    torch.testing.assert_close(nag(towards, away, 2.0, 2.5, 0.25), 0.25 * far + 0.75 * towards)
    torch.testing.assert_close(nag(towards, away, 2.0, 100.0, 1.0), 3 * towards - 2 * away)
    assert not nag(towards * 0, towards * 0, 2.0, 2.5, 0.25).any()


def test_nag_never_outgrows_its_bound() -> None:
    towards, away = torch.randn(2, 4, 2, 50, 3).double()
    out = nag(towards, away, 8.0, 2.5, 0.25)
    length = towards.abs().sum((1, 3))
    assert (out.abs().sum((1, 3)) <= (0.25 * 2.5 + 0.75) * length * (1 + 1e-12)).all()


def test_nasa_is_linear_in_its_scale_and_shrinks_where_prompts_agree() -> None:
    towards, away = torch.randn(2, 1, 2, 3, 4).double()
    one, two = Away(0.5).combine(towards, away), Away(1.0).combine(towards, away)
    torch.testing.assert_close(two - one, -0.5 * away)
    torch.testing.assert_close(Away(0.3).combine(towards, towards), 0.7 * towards)


@pytest.mark.parametrize("order", ["image first", "text first"])
def test_joint_attention_shows_each_prompt_what_it_would_see_alone(order: str) -> None:
    image, towards, away = (torch.randn(3, 1, 2, n, 4).double() for n in (5, 3, 2))
    parts, at = (
        ((image, towards, away), (0, 5, 8, 10)) if order == "image first" else ((towards, away, image), (0, 3, 5, 10))
    )
    slices = [slice(a, b) for a, b in itertools.pairwise(at)]
    i, texts = (slices[0], tuple(slices[1:])) if order == "image first" else (slices[2], tuple(slices[:2]))
    out = joint(*torch.cat(parts, 3), i, texts, Away(0.7))
    alone = [sdpa(*torch.cat([image, text], 3)) for text in (towards, away)]
    torch.testing.assert_close(out[:, :, i], alone[0][:, :, :5] - 0.7 * alone[1][:, :, :5])
    for text, z in zip(texts, alone, strict=True):
        torch.testing.assert_close(out[:, :, text], z[:, :, 5:])


@FAMILIES
@pytest.mark.parametrize("method", ["nasa", "nag"])
def test_stock_pipelines_heed_a_negative_prompt(module, method: str) -> None:
    pipe = module.pipeline()
    net = pipe.components["unet" if hasattr(pipe, "unet") else "transformer"]
    before = dict(net.attn_processors)
    plain = images(negative(pipe, 0.0, method), negative_prompt="xyz")
    assert torch.equal(plain, images(negative(pipe, 2.0, method)))  # no negative prompt
    stays = images(negative(pipe, 1e-9, method), negative_prompt="xyz")  # the whole way, at a weight of nothing
    torch.testing.assert_close(stays, plain, rtol=0, atol=2e-5)
    moved = images(negative(pipe, 2.0, method), negative_prompt="xyz")
    assert moved.isfinite().all() and (moved - plain).abs().max() > 2e-5  # the tiny networks hardly read their prompts
    assert (moved - images(negative(pipe, 2.0, method), negative_prompt="qr")).abs().max() > 1e-6
    assert all(net.attn_processors[name] is p for name, p in before.items())


@FAMILIES
def test_without_steering_it_is_the_pipeline(module) -> None:
    pipe = module.pipeline()
    call = {} if module is flux else {"guidance_scale": 1.0}
    torch.testing.assert_close(images(negative(pipe, 0.0), negative_prompt="xyz"), images(pipe, **call), rtol=0, atol=0)


def test_a_layer_of_the_unet_subtracts_the_negative_prompts_attention() -> None:
    net = sd.unet()
    attn = net.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    x, towards, away = torch.randn(2, 9, 8), torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    with torch.no_grad():
        z = [attn(x, text) - attn.to_out[0].bias for text in (towards, away)]
        with steered(net, Away(0.4), 5, 7):
            found = attn(x, torch.cat([towards, away], 1))
            itself = net.down_blocks[0].attentions[0].transformer_blocks[0].attn1
            steered_self = itself(x)
        torch.testing.assert_close(steered_self, itself(x))
    torch.testing.assert_close(found, z[0] - 0.4 * z[1] + attn.to_out[0].bias, rtol=0, atol=1e-6)


def test_padding_of_either_prompt_is_hidden() -> None:
    net = pixart.pipeline().transformer
    attn = net.transformer_blocks[0].attn2
    c, n = attn.to_q.in_features, attn.to_k.in_features
    x, towards, away = torch.randn(1, 4, c), torch.randn(1, 5, n), torch.randn(1, 3, n)
    bias = torch.tensor([[[0, 0, -1e4, -1e4, -1e4, 0, -1e4, -1e4]]])
    for method in ("nasa", "nag"):
        with torch.no_grad(), steered(net, Away(0.4, method), 5, 3):
            found = attn(x, torch.cat([towards, away], 1), attention_mask=bias)
        with torch.no_grad(), steered(net, Away(0.4, method), 2, 1):
            short = attn(x, torch.cat([towards[:, :2], away[:, :1]], 1))
        torch.testing.assert_close(found, short, rtol=0, atol=1e-6)


def test_several_prompts_and_images() -> None:
    pipe = negative(sd.pipeline(), 0.5)
    noise = torch.randn(4, 4, 8, 8)
    both = images(pipe, ["ab c", "d"], negative_prompt=["x", "yz"], num_images_per_prompt=2, latents=noise)
    for i, (prompt, away) in enumerate((("ab c", "x"), ("d", "yz"))):
        alone = images(pipe, prompt, negative_prompt=away, num_images_per_prompt=2, latents=noise[2 * i : 2 * i + 2])
        torch.testing.assert_close(both[2 * i : 2 * i + 2], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "call", "message"),
    [
        (lambda: negative(dit.pipeline(), 1.0), {}, "families sd, sdxl"),
        (lambda: negative(sd.pipeline(), -1.0), {}, "scale -1"),
        (lambda: negative(sd.pipeline(), 1.0, "cfg"), {}, "nasa or nag"),
        (lambda: negative(sd.pipeline(), 1.0, "nag", tau=0.5), {}, "tau 0.5"),
        (lambda: negative(sd.pipeline(), 1.0), {"guidance_scale": 3.0}, "guidance_scale 3.0"),
        (lambda: negative(flux.pipeline(), 1.0), {"true_cfg_scale": 3.0}, "true_cfg_scale 3.0"),
        (lambda: negative(sd.pipeline(), 1.0), {"negative_prompt": ["a", "b"]}, "2 for 1 prompts"),
    ],
)
def test_what_makes_no_sense_is_refused(make, call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        images(make(), **call)
