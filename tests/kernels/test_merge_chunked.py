"""Attention in pieces is attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from stepdistill.kernels import branch_attention, chunked_attention, merge_lse, steer_attention


def test_segments_of_keys_merge_to_one_softmax() -> None:
    q, (k, v) = torch.randn(1, 2, 5, 8).double(), torch.randn(2, 1, 2, 9, 8).double()
    cuts = [(k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 4), (4, 4), (4, 9))]
    *outs, lse = branch_attention(q, cuts, return_lse=True, prefer="naive")
    out, total = merge_lse(list(zip(outs, lse, strict=True)))
    torch.testing.assert_close(out, sdpa(q, k, v), rtol=0, atol=1e-14)
    torch.testing.assert_close(total, (q @ k.mT * 8**-0.5).logsumexp(-1), rtol=0, atol=1e-13)


def test_merging_the_kernels_answers_differentiates_through_the_log_sum_exp(one_setting) -> None:
    q, k, v = (one_setting.randn(1, 1, 7, 16, grad=True) for _ in range(3))

    def segments(backend: str):
        *outs, lse = branch_attention(
            q, [(k[:, :, :3], v[:, :, :3]), (k[:, :, 3:], v[:, :, 3:])], return_lse=True, prefer=backend
        )
        return merge_lse(list(zip(outs, lse, strict=True)))[0]

    w = one_setting.randn(1, 1, 7, 16)
    found = torch.autograd.grad((segments("triton") * w).sum(), [q, k, v])
    for a, b in zip(found, torch.autograd.grad((sdpa(q, k, v) * w).sum(), [q, k, v]), strict=True):
        one_setting.close(a, b, 4.0)


def test_parts_without_any_key() -> None:
    none = (torch.zeros(1, 2, 3), torch.full((1, 2), -torch.inf))
    out, lse = merge_lse([none, none])
    assert not out.any() and (lse == -torch.inf).all()
    with pytest.raises(ValueError, match="no parts"):
        merge_lse([])
    with pytest.raises(ValueError, match="expected"):
        merge_lse([none, (none[0][..., :2], none[1])])


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_of_queries(chunk: int) -> None:
    q, k, v = (torch.randn(2, 1, 7, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = chunked_attention(q, k, v, chunk=chunk, scale=0.3)
    torch.testing.assert_close(out, sdpa(q, k, v, scale=0.3), rtol=0, atol=1e-14)
    grads = [torch.autograd.grad(x.square().sum(), [q, k, v]) for x in (out, sdpa(q, k, v, scale=0.3))]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-13)


def test_a_chunk_of_nothing() -> None:
    with pytest.raises(ValueError, match="chunk 0"):
        chunked_attention(*[torch.zeros(1, 1, 1, 8)] * 3, chunk=0)


def test_steering_by_lists_of_one_is_attention() -> None:
    q = torch.randn(1, 2, 5, 8)
    assert torch.equal(steer_attention(q, [(q, q)], (1.0,)), sdpa(q, q, q))
