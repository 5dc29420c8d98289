"""K1: the specification against torch's attention, the Triton kernel against the specification."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from stepdistill.kernels import branch_attention, steer_attention
from stepdistill.kernels.steer_attention import naive

F64 = torch.float64


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, requires_grad=True)


def branches_of(setting, counts, b=2, h=2, d=16, grad=False):
    return [(setting.randn(b, h, n, d, grad=grad), setting.randn(b, h, n, d, grad=grad)) for n in counts]


def exact(q, kv, weights, lengths=None, scale=None):
    """The weighted sum in float64, by torch's own attention over the visible keys of each sample."""
    out = torch.zeros(q.shape, dtype=F64, device=q.device)
    for b, (r, (k, v)) in itertools.product(range(len(q)), enumerate(kv)):
        n = k.shape[2] if lengths is None else int(lengths[b, r])
        if n:
            z = sdpa(*(x[b, :, :end].double() for x, end in ((q, None), (k, n), (v, n))), scale=scale)
            out[b] += float(weights[b, r]) * z
    return out


def test_the_specification_is_a_weighted_sum_of_torch_attention() -> None:
    q, kv = double(2, 2, 5, 8), [(double(2, 2, n, 8), double(2, 2, n, 8)) for n in (7, 3)]
    weights, lengths = torch.randn(2, 2, dtype=F64), torch.tensor([[7, 0], [4, 3]])
    out, lse = naive.steer_attention(q, [k for k, _ in kv], [v for _, v in kv], weights, lengths, 8**-0.5)
    torch.testing.assert_close(out, exact(q, kv, weights, lengths), rtol=0, atol=1e-13)
    scores = q[1] @ kv[0][0][1, :, :4].mT * 8**-0.5
    torch.testing.assert_close(lse[0, 1], scores.logsumexp(-1), rtol=0, atol=1e-13)
    assert (lse[1, 0] == -torch.inf).all()


def test_derivatives_of_the_specification_are_numeric_ones() -> None:
    q, k0, v0, k1, v1 = (double(1, 1, n, 2) for n in (2, 3, 3, 2, 2))
    weights, lengths = torch.randn(1, 2, dtype=F64, requires_grad=True), torch.tensor([[2, 2]])

    def run(q, k0, v0, k1, v1, weights):
        return naive.steer_attention(q, [k0, k1], [v0, v1], weights, lengths, 0.7)

    given = (q, k0, v0, k1, v1, weights)
    assert torch.autograd.gradcheck(run, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *x: run(*x)[0], given)


SHAPES = [  # queries, keys of each branch, head dimension
    (33, (40, 5), 40),
    (1, (1, 0), 64),
    (70, (3,), 72),
    (5, (17, 33, 2), 16),
]


@pytest.mark.parametrize(("m", "counts", "d"), SHAPES, ids=str)
def test_the_kernel_is_the_specification(setting, m: int, counts: tuple[int, ...], d: int) -> None:
    q, kv = setting.randn(2, 2, m, d), branches_of(setting, counts, d=d)
    weights = torch.randn(2, len(counts), device=setting.device)
    out, lse = steer_attention(q, kv, weights, prefer="triton", return_lse=True)
    setting.close(out, exact(q, kv, weights), 4.0)
    true = naive.branch_attention(q.double(), *zip(*kv, strict=True), None, d**-0.5)[1]
    finite = true.isfinite()
    assert (lse.isfinite() == finite).all()
    setting.close(lse[finite], true[finite])


@pytest.mark.parametrize("d", [80, 128, 160])
def test_wide_heads(one_setting, d: int) -> None:
    q, kv = one_setting.randn(1, 1, 7, d), branches_of(one_setting, (34, 5), 1, 1, d)
    out = steer_attention(q, kv, (1.0, -0.5), prefer="triton")
    one_setting.close(out, exact(q, kv, torch.tensor([[1.0, -0.5]])))


def test_error_is_that_of_torch_attention_in_the_same_dtype(setting) -> None:
    q, kv = setting.randn(1, 2, 40, 40), branches_of(setting, (40,), 1, d=40)
    true = exact(q, kv, torch.ones(1, 1))
    ours, theirs = (
        (x.double() - true).abs().max() for x in (steer_attention(q, kv, (1.0,), prefer="triton"), sdpa(q, *kv[0]))
    )
    assert ours <= 2 * theirs + {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[setting.dtype]


def test_lengths_hide_keys(setting) -> None:
    q, kv = setting.randn(2, 1, 9, 16), branches_of(setting, (40, 6), h=1)
    lengths = torch.tensor([[33, 0], [1, 6]], device=setting.device)
    weights = torch.tensor([[1.0, -0.5]], device=setting.device).expand(2, 2)
    out = steer_attention(q, kv, weights, lengths=lengths, prefer="triton")
    for k, v in kv:  # what is hidden may be anything
        for b, r in itertools.product(range(2), range(2)):
            n = int(lengths[b, r])
            if (k is kv[r][0]) and n < k.shape[2]:
                k[b, :, n:] = v[b, :, n:] = 1e4
    setting.close(out, exact(q, kv, weights, lengths), 2.0)
    assert torch.equal(out, steer_attention(q, kv, weights, lengths=lengths, prefer="triton"))
    setting.close(steer_attention(q, kv, weights, lengths=lengths, prefer="sdpa"), exact(q, kv, weights, lengths), 2.0)


@pytest.mark.parametrize("backend", ["triton", "naive", "sdpa"])
def test_per_sample_weights(one_setting, backend: str) -> None:
    q, kv = one_setting.randn(3, 1, 5, 16), branches_of(one_setting, (4, 3), 3, 1)
    weights = torch.tensor([[1.0, 0.0], [1.0, -1.5], [0.3, 0.7]], device=one_setting.device)
    one_setting.close(steer_attention(q, kv, weights, prefer=backend), exact(q, kv, weights), 2.0)


def test_a_weight_of_zero_is_ordinary_attention_to_the_bit(setting) -> None:
    q, kv = setting.randn(2, 2, 20, 24), branches_of(setting, (33, 8), d=24)
    plain = sdpa(q, *kv[0])
    assert torch.equal(steer_attention(q, kv, (1.0, 0.0)), plain)
    assert torch.equal(steer_attention(q, kv, torch.tensor([1.0, 0.0], device=setting.device), prefer="sdpa"), plain)
    by_kernel = steer_attention(q, kv[:1], (1.0,), prefer="triton")
    zero = torch.tensor([1.0, 0.0], device=setting.device)
    assert torch.equal(steer_attention(q, kv, zero, prefer="triton"), by_kernel)


def test_branches_apart(setting) -> None:
    q, kv = setting.randn(2, 2, 34, 24), branches_of(setting, (5, 40), d=24)
    found = branch_attention(q, kv, prefer="triton")
    for r, (z, library) in enumerate(zip(found, branch_attention(q, kv, prefer="sdpa"), strict=True)):
        setting.close(z, exact(q, kv[r : r + 1], torch.ones(2, 1)))
        setting.close(library, exact(q, kv[r : r + 1], torch.ones(2, 1)))


def test_strided_and_expanded_inputs(setting) -> None:
    packed = setting.randn(2, 9, 3, 2, 24)  # (B, L, 3, H, d), as one projection makes them
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    shared = setting.randn(1, 2, 5, 24).expand(2, -1, -1, -1)
    turned = setting.randn(2, 2, 24, 5).mT
    kv, weights = [(k, v), (shared, turned)], torch.tensor([[1.0, -0.5]] * 2, device=setting.device)
    setting.close(steer_attention(q, kv, weights, prefer="triton"), exact(q, kv, weights))


def test_extreme_logits_and_equal_keys(setting) -> None:
    q, (k, v) = setting.randn(1, 1, 5, 16), branches_of(setting, (40,), 1, 1)[0]
    out = steer_attention(q * 30, [(k * 30, v)], (1.0,), prefer="triton")
    assert out.isfinite().all()
    setting.close(out, exact(q * 30, [(k * 30, v)], torch.ones(1, 1)), 30.0)
    same = k[:, :, :1].expand_as(k)
    mean = v.double().mean(2, keepdim=True).expand(-1, -1, 5, -1)
    setting.close(steer_attention(q, [(same, v)], (1.0,), prefer="triton"), mean)


@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 2, 0, 16)], ids=str)
def test_nothing_in_nothing_out(one_setting, shape: tuple[int, ...]) -> None:
    q = one_setting.randn(*shape, grad=True)
    k = one_setting.randn(shape[0], 2, 3, 16, grad=True)
    out = steer_attention(q, [(k, k)], (1.0,), prefer="triton")
    assert out.shape == shape
    out.sum().backward()
    assert not k.grad.any()


GRADIENTS = [(20, (33, 5), 24, True), (33, (3,), 16, False)]


@pytest.mark.parametrize(("m", "counts", "d", "limited"), GRADIENTS, ids=str)
def test_gradients_of_the_kernel(setting, m: int, counts: tuple[int, ...], d: int, limited: bool) -> None:
    q, kv = setting.randn(2, 1, m, d, grad=True), branches_of(setting, counts, h=1, d=d, grad=True)
    weights = torch.randn(2, len(counts), device=setting.device, requires_grad=True)
    lengths = torch.tensor([[30, 5], [33, 0]], device=setting.device) if limited else None
    cotangent, lse_cotangent = setting.randn(2, 1, m, d), torch.randn(len(counts), 2, 1, m, device=setting.device)
    leaves = [q, *[x for pair in kv for x in pair], weights]

    def gradients(backend: str) -> tuple[Tensor, ...]:
        out, lse = steer_attention(q, kv, weights, lengths=lengths, prefer=backend, return_lse=True)
        total = (out.float() * cotangent).sum() + (lse * lse_cotangent)[lse.isfinite()].sum()
        return torch.autograd.grad(total, leaves)

    for found, true in zip(gradients("triton"), gradients("naive"), strict=True):
        setting.close(found, true, 8.0)


def test_gradients_of_branches_apart_sum_over_what_was_expanded(one_setting) -> None:
    q, k = one_setting.randn(2, 1, 5, 16, grad=True), one_setting.randn(1, 1, 4, 16, grad=True)
    shared = k.expand(2, -1, -1, -1)

    def gradients(backend: str) -> tuple[Tensor, ...]:
        one, two = branch_attention(q, [(shared, shared), (shared * 2, shared)], prefer=backend)
        return torch.autograd.grad((one * 2 - two * two).float().sum(), [q, k])

    for found, true in zip(gradients("triton"), gradients("naive"), strict=True):
        one_setting.close(found, true, 8.0)


@pytest.mark.parametrize("weights", [(1.0,), torch.ones(3), torch.ones(1, 2)])
def test_weights_that_do_not_fit(weights) -> None:
    x = torch.zeros(2, 1, 3, 8)
    with pytest.raises(ValueError, match="weights"):
        steer_attention(x, [(x, x), (x, x)], weights)


@pytest.mark.parametrize(("keys", "lengths"), [((2, 1, 3, 4), None), ((2, 1, 3, 8), torch.ones(2, 3))])
def test_shapes_that_do_not_fit(keys: tuple[int, ...], lengths: Tensor | None) -> None:
    q, k = torch.zeros(2, 1, 3, 8), torch.zeros(keys)
    with pytest.raises(ValueError, match="expected"):
        steer_attention(q, [(k, k)], (1.0,), lengths=lengths)
