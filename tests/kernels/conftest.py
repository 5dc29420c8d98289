"""Where each kernel runs, and how near its results must come. Without a GPU that is Triton's interpreter."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

ATOL = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Setting(NamedTuple):
    """Where a kernel runs, and on what."""

    device: str
    dtype: torch.dtype

    def randn(self, *shape: int, grad: bool = False) -> Tensor:
        """Draws of one generator, the same on every device."""
        return torch.randn(shape).to(self.device, self.dtype).requires_grad_(grad)

    def close(self, found: Tensor, true: Tensor, factor: float = 1.0) -> None:
        """Within the dtype's tolerance of values of order one, or of the largest there are."""
        assert found.shape == true.shape
        if not true.numel():
            return
        error = (found.double() - true.double()).abs().max().item()
        assert error <= factor * ATOL[self.dtype] * max(1.0, true.abs().max().item()), error


def settings(**dtypes: list[torch.dtype]) -> list[object]:
    """Parameters for ``setting``: the interpreter and, where there is one, the GPU."""
    on_cpu = [pytest.param(Setting("cpu", d), id=f"interpreter-{d}") for d in dtypes["cpu"]]
    on_gpu = [pytest.param(Setting("cuda", d), id=f"cuda-{d}", marks=pytest.mark.gpu) for d in dtypes["cuda"]]
    return on_cpu + on_gpu


@pytest.fixture(params=settings(cpu=[torch.float32, torch.float16], cuda=[torch.float16, torch.bfloat16]))
def setting(request: pytest.FixtureRequest) -> Setting:
    """Each device and dtype that a kernel runs on."""
    if request.param.device == "cpu" and not INTERPRETED:
        pytest.skip("the kernels run on the GPU here")
    return request.param


@pytest.fixture(params=settings(cpu=[torch.float32], cuda=[torch.bfloat16]))
def one_setting(request: pytest.FixtureRequest) -> Setting:
    """One dtype a device."""
    if request.param.device == "cpu" and not INTERPRETED:
        pytest.skip("the kernels run on the GPU here")
    return request.param


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, so that whatever a kernel leaves unwritten is seen."""
    new_empty = Tensor.new_empty

    def made(self: Tensor, *shape: object, **kwargs: object) -> Tensor:
        x = new_empty(self, *shape, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() and x.device.type != "meta" else x

    monkeypatch.setattr(Tensor, "new_empty", made)
