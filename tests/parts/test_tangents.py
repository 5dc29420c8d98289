"""Tangents against closed forms and against each other on real networks."""

from __future__ import annotations

import pytest
import torch

from stepdistill.build import open_teacher
from stepdistill.parts.tangents import CentralDifference, Jvp
from stepdistill.recipe import Teacher
from stepdistill.schedule import RectifiedFlow
from stepdistill.testing import GaussianTeacher


def test_the_total_derivative_of_the_exact_consistency_function_is_zero() -> None:
    """Along the exact velocity the end point of a trajectory does not move; across it, it does."""
    teacher = GaussianTeacher(torch.tensor([0.4]), torch.tensor([[0.49]]), RectifiedFlow())
    x, t = torch.tensor([[1.1], [-0.3]], dtype=torch.float64), torch.tensor([0.8, 0.4], dtype=torch.float64)
    velocity = teacher(x, t, {}, want="velocity")
    for tangent, tolerance in ((Jvp(), 1e-12), (CentralDifference(1e-3), 1e-5)):
        along = tangent(teacher.consistency, (x, t), (velocity, torch.ones_like(t)))
        assert along.abs().max() < tolerance
        across = tangent(teacher.consistency, (x, t), (velocity + 1, torch.ones_like(t)))
        slope = 0.7 / ((1 - t) ** 2 * 0.49 + t**2).sqrt()  # c / sqrt(V_t)
        torch.testing.assert_close(across[:, 0], slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["digits", "shapes-sd", "shapes-sd3"])
def test_both_agree_on_the_bundled_networks(name: str) -> None:
    """With attention, time embeddings and schedules of real pipelines in between."""
    opened = open_teacher(Teacher(f"bundled:{name}"))
    n, rng = 3, torch.Generator().manual_seed(0)
    x, dx = (torch.randn(n, *opened.sample_shape, generator=rng) for _ in range(2))
    t = torch.tensor([0.2, 0.5, 0.83], dtype=torch.float64)
    cond = {"class_labels": torch.arange(n)} if name == "digits" else opened.encode(["a red circle"] * n)
    predict = opened.denoiser.requires_grad_(False).double()
    cond = {k: v.double() if v.is_floating_point() else v for k, v in cond.items()}

    def f(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return predict(x, t, cond)

    at, along = (x.double(), t), (dx.double(), torch.ones(n, dtype=torch.float64))
    exact = Jvp()(f, at, along)
    # Sinusoids of the timestep turn by up to 1 rad a timestep (1e-3 here), so h must be well below; networks compute
    # them in float32, which leaves some noise at small h.
    near = CentralDifference(1e-4)(f, at, along)
    assert not exact.requires_grad and exact.abs().mean() > 0.1
    assert (exact - near).norm() < 0.01 * exact.norm()
