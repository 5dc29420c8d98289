"""Builds the Triton kernels for GPUs that are not there, and reads registers, spills and shared memory off the result.

Triton's compiler accepts tiles that no GPU can hold; ``Built.problem`` does not.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stepdistill.kernels.block_sparse import triton as sparse
from stepdistill.kernels.qk_norm_rope import triton as rope
from stepdistill.kernels.steer_attention import backward as steer_backward
from stepdistill.kernels.steer_attention import triton as steer
from stepdistill.kernels.tiles import split

SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a block may have, by compute capability (CUDA C++ programming guide)."""
HEAD_DIMS = (40, 64, 72, 80, 128, 160)

_FLOAT32 = {"weights", "lse", "dlse", "g", "delta", "cos", "sin", "dgain"}
_INT32 = {"lengths", "index", "count"}
_SCALARS = {"scale", "log2_scale", "eps"}
_INTEGER = re.compile(r"s[a-z]\d?[a-z]|[BHLMN]\d?|part|first")
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """One kernel under one configuration."""

    name: str
    kernel: Any
    dtype: torch.dtype
    d: int
    constants: dict[str, Any]
    warps: int
    stages: int
    float32: frozenset[str] = frozenset()
    """Pointers to float32 besides the usual ones."""
    dots: bool = True
    """Whether it has matrix products."""


@dataclass(frozen=True)
class Built:
    """What came of a case on an architecture."""

    kernel: str
    dtype: str
    d: int
    sm: int
    warps: int
    stages: int
    tiles: str
    registers: int
    spills: int
    """Bytes of a thread's stack."""
    shared: int
    tensor_cores: bool
    problem: str | None
    """Why it may not be launched; None if it may."""


def cases(sm: int, dims: tuple[int, ...] = HEAD_DIMS, dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    """Every configuration of the tables that a launch of such tensors on compute capability ``sm`` / 10 can take."""
    for d in dims:
        d1, d2 = split(d)
        parts = {"D": d, "D1": d1, "D2": d2, "INTERPRET": False}
        both = {"R": 2, "SEPARATE": False, "LENGTHS": True}
        for c in {steer.config(d, n, dtype, tiles, sm) for n in (64, 512) for tiles in (1, 1000)}:
            yield Case("steer_attention", steer.forward_kernel, dtype, d,
                       parts | both | {"BM": c.queries, "BN": c.keys}, c.warps, c.stages)  # fmt: skip
        for step, kernel, more in (
            ("dQ", steer_backward.dq_kernel, {}),
            ("dKV", steer_backward.dkv_kernel, {"BRANCH": 0}),
        ):
            c = steer_backward.config(d, dtype, sm, step)
            constants = parts | both | more | {"DLSE": False, "BM": c.queries, "BN": c.keys}
            yield Case(f"steer_attention {step}", kernel, dtype, d, constants, c.warps, c.stages,
                       frozenset({"dk", "dv"} if more else ()))  # fmt: skip
        for block in (64, 128):
            for name, kernel in (
                ("forward", sparse.forward_kernel),
                ("dQ", sparse.dq_kernel),
                ("dKV", sparse.dkv_kernel),
            ):
                c = sparse.config(d, block, dtype, sm, name)
                yield Case(f"block_sparse_attention {name} {block}", kernel, dtype, d,
                           parts | {"BLOCK": block, "BM": c.queries, "BN": c.keys}, c.warps, c.stages)  # fmt: skip
        for across in (False, True):
            made, _ = rope.geometry(12, d, 4096, across)
            warps = made.pop("num_warps")
            for interleaved in (True, False):
                name = f"qk_norm_rope{' across heads' * across}{'' if interleaved else ' half-split'}"
                shape = made | {"ROPE": True, "INTERLEAVED": interleaved}
                yield Case(name, rope.forward_kernel, dtype, d, shape | {"COPY": True}, warps, 3, dots=False)
                yield Case(f"{name} backward", rope.backward_kernel, dtype, d, shape | {"DGAIN": True}, warps, 3,
                           dots=False)  # fmt: skip


def edges(dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    """The same kernels as they are specialised for sizes of one, and their other options.

    The launcher makes a constant of every integer that is 1.
    """
    options = {"R": 3, "SEPARATE": True, "LENGTHS": False, "DLSE": True, "ROPE": False, "COPY": False, "DGAIN": False}
    sizes = dict.fromkeys(("B", "H", "M", "N", "N0", "N1", "N2", "L", "first"), 1)
    for case in cases(90, (64,), dtype):
        known = {n: v for n, v in (options | sizes).items() if n in case.kernel.arg_names}
        yield replace(case, name=f"{case.name}, edges", constants=case.constants | known)


def build(case: Case, sm: int) -> Built:
    """Compile a case for compute capability ``sm`` / 10, as its launcher would, to machine code."""
    names = case.kernel.arg_names
    types = {n: _type(n, case) for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if types[n].startswith("*") or (n[0] == "s" and types[n] == "i32" and (n[-1] != "h" or case.d % 16 == 0))
    }
    constants = {(names.index(n),): value for n, value in case.constants.items()}
    made = triton.compile(
        ASTSource(case.kernel, types, constants, aligned),
        target=GPUTarget("cuda", sm, 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    ptx = made.asm["ptx"]
    registers, spills = _used(made.asm["cubin"])
    tensor_cores = "wgmma" in ptx or "mma.sync" in ptx
    problem = None
    if made.metadata.shared > SHARED_LIMIT[sm]:
        problem = f"{made.metadata.shared} bytes of shared memory; {SHARED_LIMIT[sm]} are there"
    elif spills:
        problem = f"{spills} bytes spilled"
    elif case.dots and case.dtype != torch.float32 and not tensor_cores:
        problem = "no tensor-core instructions"
    tiles = " ".join(f"{n}={case.constants[n]}" for n in ("BLOCK", "BM", "BN", "BT", "P") if n in case.constants)
    return Built(
        case.name, _NAMES[case.dtype], case.d, sm, case.warps, case.stages, tiles, registers, spills,
        made.metadata.shared, tensor_cores, problem,
    )  # fmt: skip


def _type(name: str, case: Case) -> str:
    if name in case.constants:
        return "constexpr"
    if name in _SCALARS:
        return "fp32"
    if name in _FLOAT32 | case.float32:
        return "*fp32"
    if name in _INT32:
        return "*i32"
    return "i32" if _INTEGER.fullmatch(name) else f"*{_NAMES[case.dtype]}"


def _used(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, which holds nothing but spills, by the tool that Triton brings."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    return int(found[1]), int(found[2])
