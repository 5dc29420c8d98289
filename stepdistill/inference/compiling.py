"""Networks compiled in place, and a whole sampler as one CUDA graph."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn


def check_compiler(device: torch.device) -> None:
    """Make sure that inductor can compile for a device before anything is changed.

    Raises:
        ValueError: if it cannot.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # no public name; torch 2.6 to 2.15
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "compile: torch.compile needs a C++ compiler such as g++; install one, or leave compile out"
        ) from error
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("compile: torch.compile needs triton on a GPU; install it, or leave compile out")


def compile_forward(module: nn.Module, mode: str, backend: str) -> Callable[[], None]:
    """Compile a module's forward for the shapes it will meet; hooks stay outside. Returns what undoes it."""
    options = {} if mode == "default" or backend != "inductor" else {"mode": mode}
    module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False, backend=backend, **options)
    return lambda: delattr(module, "forward")


class CudaGraph:
    """A function of tensors, recorded once on a GPU and replayed on static buffers.

    Args:
        function: launches the same kernels whatever the values are, and does not wait for the device.
        given: its arguments, of the shapes that are to come.
    """

    def __init__(self, function: Callable[..., Tensor], given: list[Tensor]):
        self.buffers = [t.clone() for t in given]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose their algorithms and allocate in the first calls
                function(*self.buffers)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = function(*self.buffers)

    def __call__(self, given: list[Tensor]) -> Tensor:
        """The function's value; the tensor is overwritten by the next call."""
        for buffer, tensor in zip(self.buffers, given, strict=True):
            buffer.copy_(tensor)
        self.graph.replay()
        return self.output
