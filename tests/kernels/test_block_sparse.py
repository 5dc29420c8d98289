"""K3: maps and lists, the specification against masked attention, the Triton kernel against the specification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from stepdistill.kernels import BlockIndex, block_sparse_attention
from stepdistill.kernels.block_sparse import (
    block_causal,
    lcsa,
    naive,
    tile_window,
    to_index,
    to_mask,
    topk_blocks,
    window_order,
)


def random_blocks(m: int, n: int, block: int, device: str = "cpu") -> BlockIndex:
    mask = torch.rand(2, 2, -(-m // block), -(-n // block)) < 0.5
    mask[0, 0, 0] = False  # some queries see nothing
    mask[1, 1, 0] = True
    return to_index(mask.to(device), block)


def dense_mask(blocks: BlockIndex, m: int, n: int) -> Tensor:
    mask = to_mask(blocks, -(-n // blocks.block)).repeat_interleave(blocks.block, -2)
    return mask.repeat_interleave(blocks.block, -1)[..., :m, :n]


def test_lists_and_maps_are_the_same_thing() -> None:
    mask = torch.rand(2, 3, 5, 7) < 0.4
    blocks = to_index(mask, 64)
    assert torch.equal(to_mask(blocks, 7), mask)
    assert blocks.index.shape[-1] == mask.sum(-1).max()
    for row, count, seen in zip(blocks.index.flatten(0, 2), blocks.count.flatten(), mask.flatten(0, 2), strict=True):
        assert row[:count].tolist() == seen.nonzero().flatten().tolist()
    assert torch.equal(to_mask(to_index(mask[0, 0], 64, longest=7), 7)[0, 0], mask[0, 0])


def test_top_blocks_are_those_of_the_best_mean_score() -> None:
    q, k = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 50, 8)  # the last blocks are shorter
    mask = topk_blocks(q, k, 2, 16)
    means_q, means_k = ([x[:, :, i : i + 16].mean(2) for i in range(0, x.shape[2], 16)] for x in (q, k))
    for h in range(2):
        for i, mean in enumerate(means_q):
            scores = torch.stack([mean[0, h] @ other[0, h] for other in means_k])
            assert set(mask[0, h, i].nonzero().flatten().tolist()) == set(scores.topk(2).indices.tolist())
    same = torch.ones(1, 1, 64, 8)
    assert topk_blocks(same, same, 3, 16).sum(-1).eq(3).all()  # ties
    assert topk_blocks(same, same, 9, 16).all()


def test_a_window_is_moved_inwards_at_borders() -> None:
    assert tile_window((5,), (3,)).int().tolist() == [
        [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1],
    ]  # fmt: skip
    mask = tile_window((4, 3, 5), (3, 1, 3))
    assert mask.shape == (60, 60) and mask.sum(-1).eq(9).all()
    at = [(t, y, x) for t in range(4) for y in range(3) for x in range(5)]
    lines = [tile_window((n,), (w,)) for n, w in ((4, 3), (3, 1), (5, 3))]
    for i, j in ((0, 0), (7, 21), (33, 59), (18, 3)):
        assert mask[i, j] == all(line[a, b] for line, a, b in zip(lines, at[i], at[j], strict=True))
    with pytest.raises(ValueError, match="odd"):
        tile_window((5,), (2,))


def test_frames_see_the_past_and_the_sink() -> None:
    mask = block_causal(4, 1, window=2, sink=1)
    assert mask.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    assert torch.equal(
        block_causal(3, 2), torch.ones(3, 3).tril().bool().repeat_interleave(2, 0).repeat_interleave(2, 1)
    )
    with pytest.raises(ValueError, match="window"):
        block_causal(3, 2, window=0)


def test_window_order_puts_windows_together() -> None:
    order = window_order(4, 6, 4, (2, 3, 2))
    assert sorted(order.tolist()) == list(range(96))
    t, y, x = order // 24, order // 4 % 6, order % 4
    window = (t // 2 * 2 + y // 3) * 2 + x // 2
    assert torch.equal(window, torch.arange(8).repeat_interleave(12))
    tokens = torch.randn(1, 96, 3)
    assert torch.equal(tokens[:, order][:, order.argsort()], tokens)
    with pytest.raises(ValueError, match="multiples"):
        window_order(3, 6, 4, (2, 3, 2))


def test_lcsa_keeps_the_best_pairs_nearby() -> None:
    rows, columns, block = 3, 4, 4
    w = rows * columns
    q, k = torch.randn(1, 2, 2 * w * block, 8), torch.randn(1, 2, 3 * w * block, 8)
    mask = lcsa(q, k, (rows, columns), ratio=0.5, local_range=3, block=block)
    means_q, means_k = (x.unflatten(2, (-1, block)).mean(3) for x in (q, k))
    scores = means_q @ means_k.mT * 8**-0.5
    for i in range(2 * w):
        for j in range(3 * w):
            a, b = divmod(i % w, columns), divmod(j % w, columns)
            if abs(a[0] - b[0]) > 1 or abs(a[1] - b[1]) > 1:
                scores[..., i, j] = -torch.inf
    p = scores.softmax(-1).reshape(2, 2, -1)  # heads, slabs of queries, pairs
    kept = mask.reshape(2, 2, -1)
    assert kept.sum(-1).eq(int(w * w * 0.5) - 1).all()
    assert (p.masked_fill(~kept, 2).amin(-1) > p.masked_fill(kept, -1).amax(-1)).all()
    assert torch.equal(
        lcsa(q, k, (rows, columns), ratio=9.0, local_range=3, block=block)[0, 0], scores[0, 0] > -torch.inf
    )


def test_the_specification_is_masked_attention() -> None:
    q, (k, v) = torch.randn(2, 2, 40, 8).double(), torch.randn(2, 2, 2, 50, 8).double()
    blocks = random_blocks(40, 50, 16)
    mask = dense_mask(blocks, 40, 50)
    out, lse = naive.block_sparse_attention(q, k, v, blocks, 0.3)
    torch.testing.assert_close(out, sdpa(q, k, v, attn_mask=mask, scale=0.3).nan_to_num(0.0), rtol=0, atol=1e-13)
    scores = (q @ k.mT * 0.3).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", ["triton", "sdpa", "flex"])
def test_backends_agree(setting, backend: str) -> None:
    m, n, block = (32, 64, 16) if backend == "flex" else (40, 50, 16)
    q, (k, v) = setting.randn(2, 2, m, 24), (setting.randn(2, 2, n, 24) for _ in range(2))
    blocks = random_blocks(m, n, block, setting.device)
    true = naive.block_sparse_attention(q.double(), k.double(), v.double(), blocks, 24**-0.5)[0]
    setting.close(block_sparse_attention(q, k, v, blocks, prefer=backend), true, 2.0)


@pytest.mark.parametrize(("m", "n", "d", "block"), [(40, 50, 24, 32), (17, 33, 16, 16)])
def test_the_kernel_and_its_gradients(setting, m: int, n: int, d: int, block: int) -> None:
    q, k = setting.randn(2, 2, m, d, grad=True), setting.randn(2, 1, n, d, grad=True)
    v = setting.randn(2, n, 2, d).transpose(1, 2).requires_grad_()
    blocks = random_blocks(m, n, block, setting.device)
    cotangent, lse_cotangent = setting.randn(2, 2, m, d), torch.randn(2, 2, m, device=setting.device)

    def run(backend: str) -> list[Tensor]:
        out, lse = block_sparse_attention(q, k.expand_as(v), v, blocks, prefer=backend, return_lse=True)
        seen = lse.isfinite()
        total = (out.float() * cotangent).sum() + (lse * lse_cotangent)[seen].sum()
        return [out, lse[seen], *torch.autograd.grad(total, [q, k, v])]

    for found, true in zip(run("triton"), run("naive"), strict=True):
        setting.close(found, true, 8.0)


def test_one_list_for_all_heads(one_setting) -> None:
    q = one_setting.randn(2, 2, 48, 16)
    blocks = to_index(block_causal(3, 1, device=one_setting.device), 16)
    true = naive.block_sparse_attention(*[q.double()] * 3, blocks, 0.25)[0]
    one_setting.close(block_sparse_attention(q, q, q, blocks, prefer="triton"), true)


def test_all_blocks_are_dense_attention(one_setting) -> None:
    q, (k, v) = one_setting.randn(1, 1, 33, 16), (one_setting.randn(1, 1, 40, 16) for _ in range(2))
    blocks = to_index(torch.ones(3, 3, dtype=torch.bool, device=one_setting.device), 16)
    one_setting.close(block_sparse_attention(q, k, v, blocks, prefer="triton"), sdpa(q, k, v), 2.0)


def test_lists_that_do_not_fit() -> None:
    x = torch.zeros(1, 1, 40, 8)
    with pytest.raises(ValueError, match=r"blocks\.count"):
        block_sparse_attention(x, x, x, to_index(torch.ones(2, 3, dtype=torch.bool), 16))
    with pytest.raises(ValueError, match="block 24"):
        to_index(torch.ones(2, 2, dtype=torch.bool), 24)
