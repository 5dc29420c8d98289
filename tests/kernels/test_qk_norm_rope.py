"""K2: the specification against diffusers' own norms and rotations, the Triton kernel against the specification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepdistill.kernels import Stream, qk_norm_rope
from stepdistill.kernels.qk_norm_rope import naive

EPS = 1e-6


def angles(length: int, half: int) -> tuple[Tensor, Tensor]:
    theta = torch.rand(length, half, dtype=torch.float64) * 6
    return theta.cos(), theta.sin()


@pytest.mark.parametrize("interleaved", [True, False])
def test_the_specification_is_torch_norm_and_diffusers_rotation(interleaved: bool) -> None:
    apply_rotary_emb = pytest.importorskip("diffusers.models.embeddings").apply_rotary_emb
    text, image = torch.randn(2, 3, 2, 8), torch.randn(2, 5, 2, 8)
    gains = [torch.rand(8), torch.rand(8)]
    cos, sin = (x.float() for x in angles(8, 4))
    out = naive.norm_rope([text, image], gains, cos, sin, EPS, interleaved, False)
    joint = torch.cat(
        [torch.nn.functional.rms_norm(x, (8,), g, EPS) for x, g in zip((text, image), gains, strict=True)], 1
    )
    twice = [x.repeat_interleave(2, -1) if interleaved else torch.cat([x, x], -1) for x in (cos, sin)]
    true = apply_rotary_emb(joint, tuple(twice), use_real_unbind_dim=-1 if interleaved else -2, sequence_dim=1)
    torch.testing.assert_close(out, true, rtol=0, atol=2e-6)


def test_across_heads_is_what_wan_does() -> None:
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    attn = wan.WanAttention(16, heads=2, dim_head=8, eps=EPS, processor=None)
    attn.norm_q.weight.data.uniform_(0.5, 2)
    x = torch.randn(1, 5, 16)
    cos, sin = (t.float() for t in angles(5, 4))
    out = naive.norm_rope([x.unflatten(2, (2, 8))], [attn.norm_q.weight], cos, sin, EPS, True, True)
    normed = attn.norm_q(x).unflatten(2, (2, 8))
    as_complex = torch.view_as_complex(normed.unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(as_complex * torch.complex(cos, sin)[:, None]).flatten(3)
    torch.testing.assert_close(out, turned, rtol=0, atol=2e-6)


def test_derivatives_of_the_specification_are_numeric_ones() -> None:
    x, gain = torch.randn(1, 2, 2, 4, dtype=torch.float64, requires_grad=True), torch.rand(4, dtype=torch.float64)
    cos, sin = angles(2, 2)

    def run(x, gain):
        return naive.norm_rope([x], [gain], cos, sin, EPS, True, False)

    given = (x, gain.requires_grad_())
    assert torch.autograd.gradcheck(run, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, given)


def test_a_rotation_keeps_lengths_and_both_pairings_agree() -> None:
    x, (cos, sin) = torch.randn(1, 5, 2, 8, dtype=torch.float64), angles(5, 4)
    turned = naive.rotate(x, cos, sin, True)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    halves = [0, 2, 4, 6, 1, 3, 5, 7]  # a pair (2i, 2i + 1) to (i, i + d / 2)
    torch.testing.assert_close(naive.rotate(x[..., halves], cos, sin, False), turned[..., halves])


CASES = [  # interleaved, across heads, rotation, heads, head dimension, two streams
    (True, False, True, 2, 16, True),
    (False, False, True, 3, 24, True),
    (True, True, True, 3, 16, False),
    (False, True, True, 2, 12, True),
    (True, False, False, 2, 40, True),
]


def streams_of(setting, across: bool, h: int, d: int, two: bool) -> list[Stream]:
    packed = setting.randn(2, 13, 3, h, d, grad=True)
    gains = [(torch.rand(h * d if across else d) + 0.5).to(packed).requires_grad_() for _ in range(3)]
    image = Stream(*packed.unbind(2), gains[0], gains[1])
    return (
        [Stream(*(setting.randn(2, 3, h, d, grad=True) for _ in range(3)), None, gains[2]), image] if two else [image]
    )


@pytest.mark.parametrize(("interleaved", "across", "rope", "h", "d", "two"), CASES)
def test_the_kernel_and_its_gradients(setting, interleaved, across, rope, h, d, two) -> None:
    streams = streams_of(setting, across, h, d, two)
    length = sum(s.q.shape[1] for s in streams)
    cos, sin = (x.to(setting.device) for x in angles(length, d // 2))
    doubled = cos.repeat_interleave(2, -1)[:, ::2], sin  # strides of their own
    cotangents = [setting.randn(2, length, h, d) for _ in range(3)]

    def run(backend: str) -> list[Tensor]:
        made = qk_norm_rope(
            streams, doubled if rope else None, eps=EPS, interleaved=interleaved, across_heads=across, prefer=backend
        )
        leaves = [x for s in streams for x in s if x is not None]
        total = sum((x.float() * c).sum() for x, c in zip(made, cotangents, strict=True))
        return [*made, *torch.autograd.grad(total, leaves)]

    for found, true in zip(run("triton"), run("naive"), strict=True):
        setting.close(found, true, 4.0)


def test_a_sample_of_its_own_angles_and_one_token(one_setting) -> None:
    x = one_setting.randn(2, 1, 2, 8)
    cos, sin = torch.randn(2, 1, 4, device=one_setting.device), torch.randn(2, 1, 4, device=one_setting.device)
    made = [
        qk_norm_rope([Stream(x, x, None, None, None)], (cos, sin), eps=EPS, prefer=p)[0] for p in ("triton", "naive")
    ]
    one_setting.close(*made, 3.0)
    assert not torch.equal(made[0][0], made[0][1])


def test_an_empty_stream(one_setting) -> None:
    x, none = one_setting.randn(1, 3, 2, 8), one_setting.randn(1, 0, 2, 8)
    streams = [Stream(none, none, none, None, None), Stream(x, x, x, None, None)]
    for found, true in zip(*(qk_norm_rope(streams, None, eps=EPS, prefer=p) for p in ("triton", "naive")), strict=True):
        one_setting.close(found, true)


def test_a_norm_of_ones_keeps_a_unit_row(one_setting) -> None:
    x = torch.full((1, 2, 1, 8), 3.0, device=one_setting.device, dtype=one_setting.dtype)
    q, k, v = qk_norm_rope([Stream(x, -x, x, None, None)], None, eps=0.0, prefer="triton")
    one_setting.close(q, torch.ones_like(x))
    one_setting.close(k, -torch.ones_like(x))
    assert v is x


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"q_gain": torch.ones(4)}, "q_gain"), ({"k": torch.zeros(1, 2, 1, 8)}, "streams"), ({"v": None}, "values")],
)
def test_shapes_that_do_not_fit(changes: dict[str, Tensor], message: str) -> None:
    x = torch.zeros(1, 3, 1, 8)
    good = Stream(x, x, x, None, None)
    with pytest.raises(ValueError, match=message):
        qk_norm_rope([good, good._replace(**changes)], None, eps=EPS)


def test_angles_that_need_a_gradient_are_refused() -> None:
    x, (cos, sin) = torch.zeros(1, 3, 1, 8), (torch.ones(3, 4, requires_grad=True), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="cos needs a gradient"):
        qk_norm_rope([Stream(x, x, x, None, None)], (cos, sin), eps=EPS)
    with pytest.raises(ValueError, match="rotary sin"):
        qk_norm_rope([Stream(x, x, x, None, None)], (cos.detach(), sin[:2]), eps=EPS)
