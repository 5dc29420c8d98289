"""Which blocks see which: builders of boolean maps (..., query blocks, key blocks), and lists made of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class BlockIndex(NamedTuple):
    """For each block of queries the blocks of keys that it sees; leading dimensions may be 1 for all samples, heads."""

    index: Tensor
    """(B or 1, H or 1, QB, width) int32, ascending; what stands from ``count`` on is not read."""
    count: Tensor
    """(B or 1, H or 1, QB) int32."""
    block: int
    """Tokens in a block, of queries and of keys; the last one may be shorter."""


def to_index(mask: Tensor, block: int, *, longest: int | None = None) -> BlockIndex:
    """Lists of a map (QB, KB), (H, QB, KB) or (B, H, QB, KB), True where a block is seen.

    ``longest`` is the length of the longest list, if the caller knows a bound: finding out waits for the device.

    Raises:
        ValueError: if ``block`` is not 16, 32, 64 or 128, or the map has other dimensions.
    """
    if block not in (16, 32, 64, 128):
        raise ValueError(f"block {block}: 16, 32, 64 or 128 expected")
    if mask.dim() not in (2, 3, 4) or mask.dtype != torch.bool:
        raise ValueError(
            f"mask {tuple(mask.shape)} {mask.dtype}: boolean (QB, KB), (H, QB, KB) or (B, H, QB, KB) expected"
        )
    mask = mask[(None,) * (4 - mask.dim())]
    count = mask.sum(-1, dtype=torch.int32)
    longest = (int(count.max()) if count.numel() else 0) if longest is None else longest
    order = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)  # seen ones first, ascending
    return BlockIndex(order[..., : max(longest, 1)].to(torch.int32).contiguous(), count, block)


def to_mask(blocks: BlockIndex, key_blocks: int) -> Tensor:
    """The map (B or 1, H or 1, QB, KB) of lists."""
    index, count, _ = blocks
    listed = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    mask = torch.zeros(*index.shape[:-1], key_blocks + 1, dtype=torch.bool, device=index.device)
    mask.scatter_(-1, torch.where(listed, index, key_blocks).long(), True)
    return mask[..., :key_blocks]


def pooled(x: Tensor, block: int) -> Tensor:
    """Means (B, H, blocks, d) over each block's tokens of (B, H, N, d), in float32; the last block may be shorter."""
    n = x.shape[2]
    sums = pad(x.float(), (0, 0, 0, -n % block)).unflatten(2, (-1, block)).sum(3)
    sizes = torch.full((sums.shape[2],), block, device=x.device)
    sizes[-1:] -= -n % block
    return sums / sizes[:, None]


def topk_blocks(q: Tensor, k: Tensor, keep: int, block: int) -> Tensor:
    """Each block of queries sees the ``keep`` blocks of keys whose mean scores best against its own mean.

    The coarse stage of video sparse attention (arXiv:2505.13389), without gradient. Ties: exactly ``keep`` are taken.

    Args:
        q: (B, H, M, d).
        k: (B, H, N, d).
        keep: at least 1; more than there are means all.
        block: tokens in a block.

    Returns:
        (B, H, QB, KB).

    Raises:
        ValueError: if ``keep`` is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep {keep}: at least 1 block of keys")
    with torch.no_grad():
        scores = pooled(q, block) @ pooled(k, block).transpose(-1, -2)
        best = scores.topk(min(keep, scores.shape[-1]), -1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def tile_window(tiles: tuple[int, ...], window: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Tiles of a video or image see those within a window around them (sliding tiles, arXiv:2502.04507).

    Near a border the window is moved inwards, so that every tile sees equally many.

    Args:
        tiles: along each axis, such as (frames, rows, columns); a block of tokens is one tile.
        window: odd extents, in tiles; more than there are means all.
        device: of the map.

    Returns:
        (T, T), T the product of ``tiles``.

    Raises:
        ValueError: if a window is even or below 1, or there are not as many as axes.
    """
    if len(tiles) != len(window) or any(w < 1 or w % 2 == 0 for w in window):
        raise ValueError(f"window {window}: {len(tiles)} odd numbers expected, one for each of the axes {tiles}")
    seen = torch.ones(1, 1, dtype=torch.bool, device=device)
    for n, w in zip(tiles, window, strict=True):
        w = min(w, n)
        at = torch.arange(n, device=device)
        first = (at - w // 2).clamp(0, n - w)[:, None]
        axis = (at >= first) & (at < first + w)
        seen = (seen[:, None, :, None] & axis[None, :, None, :]).flatten(2).flatten(0, 1)
    return seen


def block_causal(
    frames: int, per_frame: int, *, window: int | None = None, sink: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Frames see themselves and earlier ones: the last ``window`` of them, and the first ``sink`` always.

    Args:
        frames: of queries and keys alike.
        per_frame: blocks of tokens in a frame.
        window: frames seen, the present one included; None is all.
        sink: first frames that stay visible (arXiv:2309.17453).
        device: of the map.

    Returns:
        (frames per_frame, frames per_frame).

    Raises:
        ValueError: if ``window`` is below 1.
    """
    if window is not None and window < 1:
        raise ValueError(f"window {window}: at least 1 frame, the present one")
    at = torch.arange(frames, device=device)
    past = at[:, None] - at[None, :]
    seen = (past >= 0) & ((past < (window or frames)) | (at[None, :] < sink))
    return seen.repeat_interleave(per_frame, 0).repeat_interleave(per_frame, 1)


def window_order(frames: int, height: int, width: int, window: tuple[int, int, int] = (2, 8, 8)) -> Tensor:
    """Where each token of the windowed order stands in raster order, (N,): ``x[:, order]`` puts windows together.

    Its inverse is ``order.argsort()``.

    Raises:
        ValueError: if a side is no multiple of the window's.
    """
    sides = (frames, height, width)
    if any(s % w for s, w in zip(sides, window, strict=True)):
        raise ValueError(f"{sides} tokens: multiples of the window {window} expected")
    at = torch.arange(frames * height * width).reshape(sides)
    for axis, w in zip((0, 2, 4), window, strict=True):
        at = at.unflatten(axis, (-1, w))
    return at.permute(0, 2, 4, 1, 3, 5).flatten()


def lcsa(
    q: Tensor, k: Tensor, windows: tuple[int, int], *, ratio: float, local_range: int = 9, block: int = 128
) -> Tensor:
    """Locality-constrained sparse attention of FlashVSR (arXiv:2510.12747): windows nearby, and of those the best.

    Tokens are in ``window_order``, so that one window of two frames is a block and ``windows`` of them are a slab.
    Windows further away than ``local_range // 2`` rows or columns are out; the rest are ranked by the softmax of mean
    queries against mean keys, and each head's slab of queries keeps those above its (k + 1)-th,
    k = floor(W^2 ratio) - 1, over all pairs of its W query windows and all keys. Without gradient.

    Args:
        q: (B, H, slabs W block, d).
        k: (B, H, key slabs W block, d); may have earlier slabs besides, as in streaming.
        windows: rows and columns of windows in a slab; W is their product.
        ratio: of W^2 pairs kept for a slab of queries; 2.0 is the paper's quality setting, 1.5 the faster one.
        local_range: extent of the neighbourhood in windows; 9 is sharper, 11 more stable.
        block: tokens in a window.

    Returns:
        (B, H, QB, KB).

    Raises:
        ValueError: if tokens do not fill whole slabs or fewer than one pair would be kept.
    """
    rows, columns = windows
    per_slab = rows * columns
    if q.shape[2] % (per_slab * block) or k.shape[2] % (per_slab * block):
        raise ValueError(f"{q.shape[2]} queries, {k.shape[2]} keys: whole slabs of {per_slab} x {block} expected")
    keep = int(per_slab**2 * ratio) - 1
    if keep < 1:
        raise ValueError(f"ratio {ratio}: keeps {keep} of {per_slab**2} pairs; raise it")
    with torch.no_grad():
        scores = pooled(q, block) @ pooled(k, block).transpose(-1, -2) * q.shape[-1] ** -0.5
        at = torch.arange(per_slab, device=q.device)
        row, column = at // columns, at % columns
        near = ((row[:, None] - row).abs() <= local_range // 2) & ((column[:, None] - column).abs() <= local_range // 2)
        near = near.repeat(scores.shape[2] // per_slab, scores.shape[3] // per_slab)
        p = scores.masked_fill(~near, float("-inf")).softmax(-1)
        slab = p.unflatten(2, (-1, per_slab)).flatten(3)  # (B, H, slabs, W KB)
        if keep >= slab.shape[-1]:
            return near.expand_as(p)
        threshold = slab.topk(keep + 1, -1).values[..., -1:]
        return (slab > threshold).reshape(p.shape) & near
