"""The attention of few-step samplers, shape by shape, and who competes for it. Imports torch and our kernels alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from stepdistill.kernels import Stream, block_sparse_attention, qk_norm_rope, steer_attention
from stepdistill.kernels.block_sparse import naive as sparse_naive
from stepdistill.kernels.block_sparse import to_index
from stepdistill.kernels.qk_norm_rope import naive as rope_naive
from stepdistill.kernels.steer_attention import naive as steer_naive

SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
BATCHES = (1, 2, 4, 8)
SLICE = 256
"""Queries of the first sample that are held against float64, of all heads."""


@dataclass(frozen=True)
class Case:
    """One operation on one shape."""

    name: str
    kernel: str
    shape: tuple[int, ...]
    """As ``stepdistill.kernels.dispatch.choose`` files it."""
    flops: float
    bytes: float
    """That must move at least: each input read once, each output written once."""
    contestants: dict[str, Callable[[], Any]]
    reference: Callable[[], Tensor]
    """float64, for the part that ``part`` cuts out of a contestant's answer."""
    part: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Plan:
    """A case before its tensors are made."""

    name: str
    make: Callable[[torch.device, torch.dtype], Case]


def plans(suite: str) -> Iterator[Plan]:
    """``steer``, ``dense``, ``rope`` or ``sparse``."""
    for model, h, m, n, d in {
        "steer": (
            ("SD1.5 cross 64", 8, 4096, 77, 40), ("SD1.5 cross 32", 8, 1024, 77, 80),
            ("SD1.5 cross 16", 8, 256, 77, 160), ("SDXL cross 64", 10, 4096, 77, 64),
            ("SDXL cross 32", 20, 1024, 77, 64), ("PixArt cross", 16, 4096, 300, 72),
            ("Wan cross", 12, 32760, 512, 128),
        ),
        "dense": (
            ("SD1.5 self 64", 8, 4096, 4096, 40), ("SDXL self 64", 10, 4096, 4096, 64),
            ("SDXL self 32", 20, 1024, 1024, 64),
            ("PixArt self", 16, 4096, 4096, 72), ("SD3 joint", 24, 4429, 4429, 64), ("FLUX joint", 24, 4608, 4608, 128),
            ("Wan self", 12, 32760, 32760, 128),
        ),
    }.get(suite, ()):  # fmt: skip
        branches = 2 if suite == "steer" else 1
        for b in BATCHES if m < 32760 else BATCHES[:1]:
            yield Plan(f"{model}, batch {b}", _steering(f"{model}, batch {b}", b, h, m, n, d, branches))
    for model, h, d, lengths, across, rope in (
        ("FLUX double", 24, 128, (512, 4096), False, True), ("FLUX single", 24, 128, (4608,), False, True),
        ("SD3.5 norm", 24, 64, (4096, 333), False, False), ("Wan self", 12, 128, (32760,), True, True),
    ) if suite == "rope" else ():  # fmt: skip
        for b in BATCHES if max(lengths) < 32760 else BATCHES[:1]:
            yield Plan(f"{model}, batch {b}", _rotating(f"{model}, batch {b}", b, h, d, lengths, across, rope))
    for density in (0.125, 0.25, 0.5) if suite == "sparse" else ():
        for block in (64, 128):
            name = f"Wan self 32k, density {density}, block {block}"
            yield Plan(name, _sparse(name, 12, 32768, 128, block, density))


def two_calls(attend: Callable[..., Tensor], q: Tensor, branches: list[tuple[Tensor, Tensor]], a: float) -> Tensor:
    """What a library offers: a call a branch, and their combination."""
    out = attend(q, *branches[0])
    for k, v in branches[1:]:
        out = torch.add(out, attend(q, k, v), alpha=-a)
    return out


def _on(backend: SDPBackend | None, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with sdpa_kernel(backend) if backend else nullcontext():
            return call()

    return run


def _steering(name: str, b: int, h: int, m: int, n: int, d: int, branches: int) -> Callable[..., Case]:
    def make(device: torch.device, dtype: torch.dtype) -> Case:
        def tokens(count: int) -> Tensor:  # as projections leave them: (B, N, H, d) in memory
            return torch.randn(b, count, h, d, device=device, dtype=dtype).transpose(1, 2)

        q, kv, a = tokens(m), [(tokens(n), tokens(n)) for _ in range(branches)], 0.5
        weights = (1.0, -a)[:branches]
        found = {
            f"ours ({p or 'default'})": (lambda p=p: steer_attention(q, kv, weights, prefer=p))
            for p in (None, "triton", "xformers")
        }
        if device.type == "cuda":
            flex = _compiled_flex()
            found["flex"] = lambda: two_calls(flex, q, kv, a)
        for label, backend in (SDPA if device.type == "cuda" else {"": None}).items():
            call = lambda: two_calls(scaled_dot_product_attention, q, kv, a)  # noqa: E731
            found[f"sdpa {label}".strip()] = _on(backend, call)

        def reference() -> Tensor:
            x = [tuple(t[:1].double() for t in pair) for pair in kv]
            w = torch.tensor([weights], dtype=torch.float64, device=device)
            return steer_naive.steer_attention(
                q[:1, :, :SLICE].double(), [k for k, _ in x], [v for _, v in x], w, None, d**-0.5
            )[0]

        moved = dtype.itemsize * b * h * d * (2 * m + 2 * n * branches)
        return Case(
            name, "steer_attention", (b, h, m, d, *[n] * branches), 4.0 * b * h * m * n * d * branches, moved, found,
            reference, lambda out: out[:1, :, :SLICE],
        )  # fmt: skip

    return make


def _rotating(
    name: str, b: int, h: int, d: int, lengths: tuple[int, ...], across: bool, rope: bool
) -> Callable[..., Case]:
    def make(device: torch.device, dtype: torch.dtype) -> Case:
        gain = torch.rand(h * d if across else d, device=device, dtype=dtype) + 0.5
        streams = [
            Stream(*torch.randn(b, n, 3, h, d, device=device, dtype=dtype).unbind(2), gain, gain) for n in lengths
        ]
        total = sum(lengths)
        angles = torch.rand(total, d // 2, device=device) * 6
        rotary = (angles.cos(), angles.sin()) if rope else None
        cos, sin = rotary or (None, None)

        def eager() -> tuple[Tensor, ...]:
            """As diffusers writes it: norm, concatenation, rotation in float32, one after the other."""

            def one(parts: list[Tensor]) -> Tensor:
                if across:
                    normed = [rms_norm(x.flatten(2), gain.shape, gain, 1e-6).unflatten(2, (h, d)) for x in parts]
                else:
                    normed = [rms_norm(x, gain.shape, gain, 1e-6) for x in parts]
                x = torch.cat(normed, 1) if len(normed) > 1 else normed[0]
                if cos is None or sin is None:
                    return x
                pairs = x.float().unflatten(-1, (-1, 2))
                turned = torch.stack((-pairs[..., 1], pairs[..., 0]), -1)
                c, s = (t[:, None, :, None] for t in (cos, sin))
                return (pairs * c + turned * s).flatten(-2).to(x.dtype)

            v = [s.v for s in streams]
            return one([s.q for s in streams]), one([s.k for s in streams]), torch.cat(v, 1) if len(v) > 1 else v[0]

        found: dict[str, Callable[[], Any]] = {
            "ours (triton)": lambda: qk_norm_rope(streams, rotary, eps=1e-6, across_heads=across, prefer="triton"),
            "naive": lambda: qk_norm_rope(streams, rotary, eps=1e-6, across_heads=across, prefer="naive"),
            "eager": eager,
        }
        if device.type == "cuda":
            found["compiled"] = torch.compile(eager, dynamic=False)

        def reference() -> Tensor:
            x = streams[0].q[:1, :SLICE].double()
            c, s = (None, None) if cos is None or sin is None else (cos[:SLICE].double(), sin[:SLICE].double())
            return rope_naive.norm_rope([x], [gain.double()], c, s, 1e-6, True, across)

        tensors = 3 if len(lengths) > 1 else 2
        moved = dtype.itemsize * 2.0 * tensors * b * total * h * d
        return Case(
            name, "qk_norm_rope", (b, h, d, *lengths), 20.0 * b * total * h * d, moved, found, reference,
            lambda out: out[0][:1, :SLICE],
        )  # fmt: skip

    return make


def _sparse(name: str, h: int, n: int, d: int, block: int, density: float) -> Callable[..., Case]:
    def make(device: torch.device, dtype: torch.dtype) -> Case:
        q, k, v = (torch.randn(1, n, h, d, device=device, dtype=dtype).transpose(1, 2) for _ in range(3))
        count = n // block
        keep = round(density * count)
        mask = torch.zeros(1, h, count, count, dtype=torch.bool, device=device)
        mask.scatter_(-1, torch.rand(mask.shape, device=device).topk(keep, -1).indices, True)
        blocks = to_index(mask, block)
        found: dict[str, Callable[[], Any]] = {
            "ours (triton)": lambda: block_sparse_attention(q, k, v, blocks, prefer="triton"),
            "flex": lambda: block_sparse_attention(q, k, v, blocks, prefer="flex"),
        }
        for label, backend in (SDPA if device.type == "cuda" else {"": None}).items():
            if label != "math":  # 32k x 32k scores in memory
                found[f"dense sdpa {label}".strip()] = _on(backend, lambda: scaled_dot_product_attention(q, k, v))

        def reference() -> Tensor:
            rows = -(-SLICE // block)
            part = to_index(mask[:, :, :rows], block)
            return sparse_naive.block_sparse_attention(
                q[:, :, : rows * block].double(), k.double(), v.double(), part, d**-0.5
            )[0][:, :, :SLICE]

        moved = dtype.itemsize * 4.0 * h * n * d
        return Case(
            name, "block_sparse_attention", (1, h, n, d, n, block, keep), 4.0 * h * n * n * d * density, moved, found,
            reference, lambda out: out[:, :, :SLICE],
        )  # fmt: skip

    return make


def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
