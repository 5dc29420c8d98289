"""Which implementation runs: a library's attention, a Triton kernel of ours, or the naive form.

Libraries are the default. A Triton kernel is chosen by itself only for shapes listed in ``enabled.json``, which
``eval/attention.py --enable`` writes from stored timings that show a gain of 5 % or more on that very device.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Backend = Literal["triton", "sdpa", "xformers", "flex", "naive"]
BACKENDS: tuple[Backend, ...] = ("triton", "sdpa", "xformers", "flex", "naive")

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
XFORMERS_INSTALLED = importlib.util.find_spec("xformers") is not None

_preferred: list[Backend] = []
_logged: set[tuple[str, ...]] = set()
_probed: dict[tuple[object, ...], str | None] = {}


def _read_enabled() -> frozenset[tuple[object, ...]]:
    rows = json.loads(Path(__file__).with_name("enabled.json").read_text())["rows"]
    return frozenset((r["kernel"], r["device"], r["dtype"], *r["shape"]) for r in rows)


_enabled = _read_enabled()


@contextmanager
def prefer(backend: Backend) -> Iterator[None]:
    """Within it every kernel that knows ``backend`` uses it; an argument ``prefer=`` of a call goes before.

    Second derivatives (gradient penalties through attention) need ``prefer("naive")``.

    Raises:
        ValueError: for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    _preferred.append(backend)
    try:
        yield
    finally:
        _preferred.pop()


def choose(
    kernel: str, problems: Mapping[Backend, str | None], like: Tensor, shape: tuple[int, ...], wanted: Backend | None
) -> Backend:
    """The backend of a call.

    Args:
        kernel: name of the operation.
        problems: what keeps each backend that could serve from doing so, None where nothing does; libraries in order
            of preference, ``naive`` last.
        like: an input; its device and dtype count.
        shape: what timings are filed under.
        wanted: the caller's ``prefer=``.

    Raises:
        ValueError: if the caller wants one that cannot serve; says why.
    """
    if wanted is None and _preferred and _preferred[-1] in problems:
        wanted = _preferred[-1]
    if forward_mode():  # no backend but the naive form has tangents; a custom op would yield zeros, silently
        problems = {b: None if b == "naive" else "it has no forward-mode derivative" for b in problems}
    if wanted is not None:
        if wanted not in problems:
            raise ValueError(f"{kernel}: prefer={wanted!r} is none of {', '.join(problems)}")
        if problems[wanted]:
            raise ValueError(f"{kernel}: prefer={wanted!r} cannot serve: {problems[wanted]}; leave prefer out")
        chosen = wanted
    elif "triton" in problems and problems["triton"] is None and enabled(kernel, like, shape):
        chosen = "triton"
    else:
        chosen = next(b for b, problem in problems.items() if b != "triton" and problem is None)
    if not torch.compiler.is_compiling():
        _log_once(kernel, chosen, like, shape)
    return chosen


def enabled(kernel: str, like: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether stored timings on this device let the Triton kernel be the default for a shape.

    They are of inference: where gradients are recorded, libraries stay the default.
    """
    if not _enabled or like.device.type != "cuda" or torch.is_grad_enabled():
        return False
    return (kernel, torch.cuda.get_device_name(like.device), str(like.dtype).removeprefix("torch."), *shape) in _enabled


def _log_once(kernel: str, chosen: Backend, like: Tensor, shape: tuple[int, ...]) -> None:
    key = (kernel, chosen, like.device.type, str(like.dtype), str(shape))
    if key not in _logged:
        _logged.add(key)
        logger.info("%s %s %s on %s: %s", kernel, shape, like.dtype, like.device.type, chosen)


def forward_mode() -> bool:
    """Whether forward-mode differentiation (``torch.func.jvp``, ``dual_level``) is under way."""
    return torch.autograd.forward_ad._current_level >= 0  # private; test_forward_mode says when it moves


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in autocast's dtype where it is on: it casts what goes into torch's operators, not into custom ones."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on any device, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_problem(*tensors: Tensor, half: bool = True) -> str | None:
    """What keeps Triton kernels from running on these tensors; None if nothing does.

    ``half`` says that the kernel lives off tensor cores, so that float32 is left to libraries (but in the interpreter).
    """
    device = tensors[0].device
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if any(t.device != device for t in tensors):
        return "the tensors are on several devices"
    if any(t.dtype != tensors[0].dtype for t in tensors):
        return "the tensors differ in dtype"
    if tensors[0].dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {tensors[0].dtype} is none of float16, bfloat16, float32"
    if interpreting():
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return "it needs an NVIDIA GPU (on a CPU, TRITON_INTERPRET=1 runs it for tests)"
    if half and tensors[0].dtype == torch.float32:
        return "float32 has nothing to gain from it; cast to bfloat16 or float16"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0; older chips compile it to code without tensor cores"
    return None


def xformers_problem(like: Tensor) -> str | None:
    """What keeps ``xformers.ops.memory_efficient_attention`` from serving tensors (B, H, M, d) like this one.

    Asked by a real call, forward and backward: the package imports, and calls itself available, without its kernels.
    """
    if not XFORMERS_INSTALLED:
        return "xformers is not installed"
    key = (like.device.type, like.device.index, like.dtype, like.shape[-1])
    if key not in _probed:
        if torch.compiler.is_compiling():
            return "it was not tried yet; call it once outside torch.compile"
        _probed[key] = _probe_xformers(like)
    return _probed[key]


def _probe_xformers(like: Tensor) -> str | None:
    try:
        from xformers.ops import memory_efficient_attention

        with torch.enable_grad():
            x = torch.zeros(1, 8, 1, like.shape[-1], dtype=like.dtype, device=like.device, requires_grad=True)
            memory_efficient_attention(x, x, x).sum().backward()
    except (ImportError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        return f"xformers refuses {like.dtype}, head dimension {like.shape[-1]} on {like.device.type} " \
               f"({str(error).strip().splitlines()[0]})"  # fmt: skip
    return None


def flex_problem(*tensors: Tensor) -> str | None:
    """What keeps ``flex_attention`` from serving these tensors."""
    if tensors[0].device.type == "cpu" and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "it has no backward pass on a CPU"
    return None
