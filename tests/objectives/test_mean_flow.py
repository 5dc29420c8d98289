"""MeanFlow against the exact average velocity, on every path, and a naive re-derivation of its loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.functional.distances import L2, AdaptiveL2
from stepdistill.models.denoiser import Guided
from stepdistill.models.nets import Nets
from stepdistill.models.two_time import TwoTime
from stepdistill.objective import Batch, Step
from stepdistill.objectives import MeanFlow
from stepdistill.parts.flow import STRAIGHT, on_straight, start_state, start_time, straight
from stepdistill.parts.tangents import CentralDifference, Jvp, Tangent
from stepdistill.parts.times import Uniform
from stepdistill.sampling import Ddim, Heun, Renoise, Sampler, at, trailing
from stepdistill.schedule import EDM, DiscreteVP, RectifiedFlow, Schedule, TrigFlow
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, mlp
from stepdistill.trainer import AdamW

from .conftest import distilled, pretrained, student_like
from .flow_maps import ExactFlowMap, bed, map_error

PATHS: dict[str, Callable[[], Schedule]] = {
    "flow": RectifiedFlow,
    "vp": DiscreteVP.linear,
    "edm": EDM,
    "trig": lambda: TrigFlow(0.5),
}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Schedule:
    return PATHS[request.param]()


def batch_of(teacher: GaussianTeacher, n: int) -> Batch:
    x0 = teacher.sample(n, torch.Generator().manual_seed(2), dtype=torch.float64)
    return Batch({}, (n, teacher.dim), x0=x0)


def distilling(**changes: object) -> MeanFlow:
    return MeanFlow(**{"velocity": "teacher", "unequal": 1.0, "times": Uniform(), "distance": L2()} | changes)


# The straight path


def test_an_average_velocity_of_the_method_book() -> None:
    exact = straight(ExactFlowMap(bed(RectifiedFlow())))
    x, t, s = (torch.tensor([v], dtype=torch.float64) for v in (1.1, 0.8, 0.3))
    got = exact(x[:, None], t, {}, want="velocity", s=s)
    assert_close(got, torch.tensor([[0.19684624]], dtype=torch.float64), rtol=0, atol=5e-9)
    assert_close(exact(x[:, None], t, {}, want="velocity", s=t).item(), 0.68556701, rtol=0, atol=5e-9)


def test_every_path_has_the_same_average_velocities(path: Schedule) -> None:
    here, there = straight(ExactFlowMap(bed(path))), ExactFlowMap(bed(RectifiedFlow()))
    x, t, s = torch.randn(5, 1).double(), torch.linspace(0.2, 0.95, 5).double(), torch.linspace(0, 0.8, 5).double()
    wanted = there(x, t, {}, want="velocity", s=s)
    assert_close(here(x, t, {}, want="velocity", s=s), wanted, rtol=1e-7, atol=1e-7)


def test_sampling_starts_where_the_straight_path_does(path: Schedule) -> None:
    """A jump from there to the data is the student's own first step."""
    student, noise = ExactFlowMap(bed(path)), torch.randn(6, 1).double()
    top, start = start_time(path), start_state(path, noise)
    assert (top > 1 - 1e-12) == isinstance(path, RectifiedFlow | TrigFlow) and 0.98 < top <= 1
    own = student(noise * path.prior_std, at(path.t_max, noise), {})
    u = straight(student)(start, at(top, start), {}, want="velocity", s=at(0.0, start))
    assert_close(start - top * u, own, rtol=1e-6, atol=1e-6)


# The loss


@pytest.mark.parametrize(("tangent", "most"), [(Jvp(), 1e-18), (CentralDifference(1e-3), 1e-6)])
def test_the_exact_flow_map_has_no_loss(path: Schedule, tangent: Tangent, most: float) -> None:
    teacher = bed(path)
    nets = Nets({"student": ExactFlowMap(teacher), "teacher": teacher})
    for objective in (distilling(tangent=tangent), distilling(tangent=tangent, to_grid=1.0)):
        assert objective.student_loss(nets, batch_of(teacher, 200), Step.at(0)).total.item() < most


def test_a_student_that_only_denoises_has_a_loss(path: Schedule) -> None:
    class Denoises(ExactFlowMap):
        def forward(self, x_t: Tensor, t: Tensor, cond, *, want="x0", s=None) -> Tensor:
            return super().forward(x_t, t, cond, want=want, s=t)

    teacher = bed(path)
    nets = Nets({"student": Denoises(teacher), "teacher": teacher})
    assert distilling().student_loss(nets, batch_of(teacher, 200), Step.at(0)).total.item() > 1e-3
    plain = distilling(unequal=0.0)  # which asks for no more than denoising
    assert plain.student_loss(nets, batch_of(teacher, 200), Step.at(0)).total.item() < 1e-20


def labelled(seed: int = 0) -> tuple[Nets, Batch]:
    """A student of two times and a guided teacher, both of two classes, in float64, and a batch."""
    torch.manual_seed(seed)
    schedule = RectifiedFlow()
    net = TwoTime(mlp(2, width=16, classes=2), at="enter")
    nn.init.normal_(net.second[2].weight, std=0.3)
    student = Student(Sampler(trailing(2), Ddim()), net, schedule, "velocity").double()
    teacher = Student(Sampler(), mlp(2, width=16, classes=2), schedule, "velocity").double()
    nets = Nets({"student": student, "teacher": Guided(teacher, 2.0, {"labels": torch.tensor([2])})})
    return nets, Batch({"labels": torch.arange(12) % 2}, (12, 2), x0=torch.randn(12, 2, dtype=torch.float64))


@pytest.mark.parametrize("velocity", ["data", "teacher"])
@pytest.mark.parametrize("kappa", [0.0, 0.4])
def test_the_loss_equals_a_loop_over_samples(velocity: str, kappa: float) -> None:
    """Draws, velocities, mixing and the derivative by reverse-mode differentiation, one sample at a time."""
    nets, batch = labelled()
    n, schedule = len(batch), nets.student.schedule
    mixes = {"omega": 0.7, "kappa": kappa, "mix_until": 0.6, "drop": 0.3} if velocity == "data" else {}
    objective = MeanFlow(
        velocity=velocity, unequal=0.5, to_grid=0.3, tangent_warmup=10, distance=AdaptiveL2(0.75, 0.01), **mixes
    )
    got = objective.student_loss(nets, batch, Step.at(4)).total

    step = Step.at(4)
    eps = step.randn((n, 2)).double()
    a, b = (torch.sigmoid(-0.4 + step.randn((n,)).double()) for _ in range(2))  # on a flow, log-normal is this
    coin, dropped = step.rand(n), step.rand(n) < 0.3
    expected = 0.0
    for i in range(n):
        t, s = max(a[i], b[i]), min(a[i], b[i])
        if coin[i] < 0.3:
            s = torch.tensor(0.5 if t > 0.5 else 0.0, dtype=torch.float64)
        if i % 2:  # every other one
            s = t
        x_t = ((1 - t) * batch.x0[i] + t * eps[i])[None]
        label, null = batch.cond["labels"][i : i + 1], torch.tensor([2])

        def u(x, time, goal, label):
            return nets.student(x, time[None], {"labels": label}, want="velocity", s=goal[None])

        with torch.no_grad():
            if velocity == "teacher":
                c, z = (nets.teacher.denoiser(x_t, t[None], {"labels": k}, want="velocity") for k in (label, null))
                v = z + 2.0 * (c - z)
            else:
                v = (eps[i] - batch.x0[i])[None]
                if dropped[i]:
                    label = null
                elif t <= 0.6:
                    v = 0.7 * v + (0.3 - kappa) * u(x_t, t, t, null) + kappa * u(x_t, t, t, label)
        _, dudt = torch.autograd.functional.jvp(
            lambda x, time: u(x, time, s, label),  # noqa: B023
            (x_t, t),
            (v, torch.ones_like(t)),
        )
        target = v - 0.5 * (t - s) * dudt  # the fifth of ten steps of warm-up
        e = (u(x_t, t, s, label) - target).square().sum()
        expected += (e / (e.detach() + 0.01) ** 0.75) / n
    assert schedule.t_max == 1.0
    assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_of_small_batches_too_the_stated_share_heads_elsewhere(n: int) -> None:
    nets, _ = labelled(3)
    apart = sum(len(MeanFlow().draw(nets.student, n, Step.at(index))[2]) for index in range(4))
    assert apart == n  # a quarter of four batches


def test_mixing_needs_conditions() -> None:
    nets, batch = labelled(3)
    with pytest.raises(ValueError, match="omega and kappa need conditions and a null one; leave them 1 and 0"):
        MeanFlow(omega=2.0, drop=0.0).student_loss(nets, Batch({}, batch.shape, x0=batch.x0), Step.at(0))


def test_gradients_flow_through_the_prediction_alone() -> None:
    nets, batch = labelled(3)
    objective = MeanFlow(unequal=1.0, distance=L2(), omega=0.8, kappa=0.1)
    seen: list[tuple[Tensor, Tensor]] = []

    class Watched(L2):
        def __call__(self, a: Tensor, b: Tensor) -> Tensor:
            seen.append((a, b))
            return super().__call__(a, b)

    MeanFlow(unequal=1.0, distance=Watched(), omega=0.8, kappa=0.1).student_loss(
        nets, batch, Step.at(0)
    ).total.backward()
    ((out, target),) = seen
    assert out.requires_grad and not target.requires_grad
    assert all(p.grad is None for p in nets.teacher.parameters())
    assert all(p.grad is not None for p in nets.student.net.second.parameters())
    assert objective.turns()[0].moves == ("student",)


def test_times_are_the_students_own_seen_on_the_straight_path() -> None:
    student = Student(Sampler(trailing(4), Ddim()), mlp(2), DiscreteVP.linear(), "v")
    t, s, apart = distilling().draw(student, 500, Step.at(0))
    own = student.schedule.t_from_logsnr(STRAIGHT.logsnr(t))
    assert len(apart) == 500 and bool((s <= t).all() and (s >= 0).all())
    assert abs(own.mean() - 2 / 3) < 0.03 and abs(s.gt(0.5).double().mean() - (1 - 0.23) ** 2) < 0.1
    grid = distilling(to_grid=1.0).draw(student, 200, Step.at(0))[1]
    edges = on_straight(student.schedule, torch.tensor([0.75, 0.5, 0.25], dtype=torch.float64))
    assert {round(v, 6) for v in grid.tolist()} == {round(v, 6) for v in edges.tolist()} | {0.0}
    t, s, apart = MeanFlow().draw(student, 64, Step.at(0))
    assert len(apart) == 16 and bool((s < t)[apart].all()) and int((s < t).sum()) == 16  # a quarter, as in the paper


@pytest.mark.parametrize("h", [0.02, 0.3])
def test_differences_look_neither_below_s_nor_beyond_the_start(h: float) -> None:
    """On noise, where extrapolating would cost most, and with an h that is longer than most gaps."""
    seen: list[Tensor] = []

    class Watched(ExactFlowMap):
        def forward(self, x_t: Tensor, t: Tensor, cond, *, want="x0", s=None) -> Tensor:
            seen.append(torch.stack([t, s]).detach())
            return super().forward(x_t, t, cond, want=want, s=s)

    teacher = bed(RectifiedFlow())
    nets = Nets({"student": Watched(teacher), "teacher": teacher})
    objective = distilling(tangent=CentralDifference(h), times=Uniform(0.5, 1.0))
    loss = objective.student_loss(nets, batch_of(teacher, 400), Step.at(0)).total.item()
    (ahead, behind, now) = seen
    assert max(ahead[0].max(), now[0].max()) <= 1 and bool((behind[0] >= behind[1] - 1e-9).all())
    assert ((ahead[0] - behind[0]) <= 2 * h + 1e-9).all() and (ahead[0] - behind[0]).max() > h
    assert loss < 0.05 * h**2  # a bias of the order of h where it looks back, of its square elsewhere


def test_looking_back_is_along_the_trajectory() -> None:
    """Right below the start, where it moves by h: the middle of both points is where Euler's step back leads."""
    states: list[tuple[Tensor, Tensor]] = []

    class Watched(ExactFlowMap):
        def forward(self, x_t: Tensor, t: Tensor, cond, *, want="x0", s=None) -> Tensor:
            states.append((x_t.detach(), t.detach()))
            return super().forward(x_t, t, cond, want=want, s=s)

    teacher = bed(RectifiedFlow())
    nets = Nets({"student": Watched(teacher), "teacher": teacher})
    objective = distilling(tangent=CentralDifference(0.1), times=Uniform(0.99, 1.0), to_grid=1.0)
    objective.student_loss(nets, batch_of(teacher, 50), Step.at(0))
    (ahead, t_ahead), (behind, t_behind), (x, t) = states
    middle, shift = (t_ahead + t_behind) / 2, t - (t_ahead + t_behind) / 2
    assert shift.min() > 0.08 and t_ahead.max() < 1 and bool((middle > 0.85).all())
    v = teacher(x, t, {}, want="velocity")
    assert_close((ahead + behind) / 2, x - shift[:, None] * v, rtol=1e-9, atol=1e-9)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"objective\.unequal must lie in \[0, 1\]; got 2"):
        MeanFlow(unequal=2)
    with pytest.raises(ValueError, match=r"a teacher has teacher\.guidance"):
        MeanFlow(velocity="teacher", omega=0.2, kappa=0.9)
    with pytest.raises(ValueError, match="omega > 0"):
        MeanFlow(kappa=1.0)
    with pytest.raises(ValueError, match="a flow map is sampled by its jumps"):
        MeanFlow().check(Sampler(trailing(2), Heun()))
    MeanFlow().check(Sampler(trailing(2), Renoise()))
    with pytest.raises(ValueError, match="AdaptiveL2 needs"):
        AdaptiveL2(power=2.0)


# Training


@pytest.mark.parametrize("steps", [1, 2])
def test_distillation_reaches_the_exact_ode_map(gaussian: GaussianTeacher, steps: int) -> None:
    sampler, start = Sampler(trailing(steps), Ddim()), pretrained(gaussian)
    assert map_error(gaussian, student_like(start, sampler)) > 0.5
    objective = distilling(to_grid=0.5, distance=AdaptiveL2(), tangent=CentralDifference(0.1))
    optim = {"student": AdamW(1e-3, decay="linear")}
    after = map_error(gaussian, distilled(objective, gaussian, start, sampler, optim, 400, batch=128))
    # 0.11 to 0.18 in one step from 0.72, 0.18 to 0.21 in two from 0.53, over three seeds
    assert after < 0.35
