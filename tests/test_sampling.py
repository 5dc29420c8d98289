"""Samplers against closed forms on Gaussian data, fitted orders of convergence, and diffusers' schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    TCDScheduler,
)
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.models.denoiser import Cond, Denoiser
from stepdistill.sampling import (
    Ddim,
    DpmPP2M,
    Heun,
    Move,
    Renoise,
    Sampler,
    StepRule,
    Tcd,
    at,
    sample,
    sample_rngs,
    trailing,
)
from stepdistill.schedule import EDM, DiscreteVP, Kind, RectifiedFlow, Schedule, TrigFlow
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, MixtureTeacher, mlp

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
MEAN = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
COV = torch.tensor([[1.4, 0.3, -0.2], [0.3, 0.5, 0.1], [-0.2, 0.1, 0.25]], dtype=torch.float64)
RULES = {"ddim": Ddim(), "heun": Heun(), "dpm++": DpmPP2M(), "renoise": Renoise(), "tcd": Tcd(0.5)}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(steps: int) -> tuple[float, ...]:
    return tuple(1 - i / steps for i in range(steps))


class Counting(nn.Module):
    """A predictor that keeps the times it was asked at."""

    def __init__(self, predictor: nn.Module):
        super().__init__()
        self.predictor, self.schedule = predictor, predictor.schedule
        self.times: list[float] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *, want: Kind = "x0") -> Tensor:
        self.times.append(float(t[0]))
        return self.predictor(x_t, t, cond, want=want)


class Known(nn.Module):
    """A predictor that always gives the true clean samples."""

    def __init__(self, schedule: Schedule, x0: Tensor):
        super().__init__()
        self.schedule, self.x0 = schedule, x0

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *, want: Kind = "x0") -> Tensor:
        return self.x0


# Grids


@pytest.mark.parametrize(
    ("steps", "indices"),
    [
        (1, [999]),
        (2, [999, 499]),
        (4, [999, 749, 499, 249]),
        (8, [999, 874, 749, 624, 499, 374, 249, 124]),
    ],
)
def test_trailing_grids_visit_the_entries_that_diffusers_visits(steps: int, indices: list[int]) -> None:
    assert [round(t * 1000) - 1 for t in trailing(steps)] == indices
    theirs = DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == indices
    assert trailing(steps)[0] == 1.0


def test_bad_grids_are_refused_with_their_values() -> None:
    with pytest.raises(ValueError, match="at least 1; got 0"):
        trailing(0)
    for times in ((), (1.0, 0.0), (0.5, 0.5), (0.5, 0.7), (1.1, 0.5), (0.5, -0.1)):
        with pytest.raises(ValueError, match="times must fall strictly"):
            Sampler(times)
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\]; got 1\.5"):
        Tcd(1.5)
    with pytest.raises(ValueError, match=r"gamma must lie"):
        Tcd(-0.1)


# Deterministic rules


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_ddim_run_on_a_gaussian_multiplies_by_the_product_of_contractions(schedule: Schedule, steps: int) -> None:
    teacher = GaussianTeacher(MEAN, COV, schedule)
    noise = torch.randn(5, 3, dtype=torch.float64)
    variances, axes = torch.linalg.eigh(COV)
    grid = torch.tensor([*uniform(steps), 0.0], dtype=torch.float64) * schedule.t_max
    c = schedule(grid)
    factor = torch.ones(3, dtype=torch.float64)
    for i in range(steps):
        a_t, a_s, s_t, s_s = c.alpha[i], c.alpha[i + 1], c.sigma[i], c.sigma[i + 1]
        factor = factor * (a_t * a_s * variances + s_t * s_s) / (a_t**2 * variances + s_t**2)
    start = noise * schedule.prior_std - c.alpha[0] * MEAN
    out = Sampler(uniform(steps), Ddim()).run(teacher, noise, {}, rng())
    assert_close(out, MEAN + (start @ axes * factor) @ axes.T, **TIGHT)


def test_64_euler_steps_shrink_a_gaussian_by_the_golden_factor() -> None:
    """Flow, 1 to .001, standard deviation .6: .58654594 where the exact map has .59940083."""
    teacher = GaussianTeacher(torch.zeros(1), torch.tensor([[0.36]], dtype=torch.float64), RectifiedFlow())
    grid = tuple(torch.linspace(1, 0.001, 65, dtype=torch.float64).tolist())
    one = torch.ones(1, 1, dtype=torch.float64)
    out = Sampler(grid, Ddim()).run(teacher, one, {}, rng(), stop=64)
    assert_close(float(out), 0.58654594, rtol=0, atol=5e-9)
    exact = teacher.flow_map(one, at(1.0, one), at(0.001, one))
    assert_close(float(exact), 0.59940083, rtol=0, atol=5e-9)


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2), ("dpm++", 2)])
@pytest.mark.parametrize("path", [RectifiedFlow(), TrigFlow(0.5), DiscreteVP.linear()], ids=["flow", "trig", "vp"])
def test_rules_converge_with_their_order(name: str, order: int, path: Schedule) -> None:
    """Down a log-SNR range cut into ever more equal steps, against the exact map."""
    teacher = GaussianTeacher(MEAN, COV, path)
    noise = torch.randn(4, 3, dtype=torch.float64)
    steps, errors = [32, 64, 128, 256], []
    for n in steps:
        grid = (path.t_from_logsnr(torch.linspace(-5, 5, n + 1, dtype=torch.float64)) / path.t_max).tolist()
        out = Sampler(tuple(grid), RULES[name]).run(teacher, noise, {}, rng(), stop=n)
        start, end = (at(grid[i] * path.t_max, noise) for i in (0, n))
        errors.append(float((out - teacher.flow_map(noise * path.prior_std, start, end)).abs().max()))
    logs = torch.tensor([steps, errors], dtype=torch.float64).log()
    slope = -float(logs.cov()[0, 1] / logs[0].var())
    assert order - 0.15 < slope < order + 0.25, (slope, errors)


def test_second_order_rules_beat_ddim_at_equal_cost_on_a_mixture() -> None:
    teacher = MixtureTeacher(
        torch.tensor([0.2, 0.5, 0.3]), torch.tensor([[-1.0], [0.5], [2.0]]), torch.tensor([0.3, 0.5, 0.2]), EDM()
    )
    noise = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    exact = teacher.consistency(80 * noise, at(80.0, noise))

    def karras(n: int) -> tuple[float, ...]:
        ramp = torch.linspace(0, 1, n, dtype=torch.float64)
        return tuple(((80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 / 80).tolist())

    error = {}
    for name, calls in (("ddim", 40), ("heun", 20), ("dpm++", 40)):
        out = Sampler(karras(calls), RULES[name]).run(teacher, noise, {}, rng())
        error[name] = float((out - exact).abs().mean())
    assert error["heun"] < 0.6 * error["ddim"]
    assert error["dpm++"] < 0.2 * error["ddim"]


def test_ddim_matches_diffusers() -> None:
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    theirs = DDIMScheduler(**betas, clip_sample=False, timestep_spacing="trailing")
    teacher = GaussianTeacher(MEAN, COV, DiscreteVP(theirs.alphas_cumprod))
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    noise = torch.randn(4, 3, dtype=torch.float64)
    for steps in (1, 4, 10):
        theirs.set_timesteps(steps)
        x = noise
        for index in theirs.timesteps:
            eps = teacher(x, at((int(index) + 1) / 1000, x), {}, want="eps")
            x = theirs.step(eps, int(index), x, eta=0.0).prev_sample
        ours = Sampler(trailing(steps), Ddim()).run(teacher, noise, {}, rng())
        assert_close(ours, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [5, 20])
def test_dpm_solver_matches_diffusers(steps: int) -> None:
    theirs = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        solver_order=2,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    teacher = GaussianTeacher(MEAN, COV, DiscreteVP(theirs.alphas_cumprod))
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == [round(t * 1000) - 1 for t in trailing(steps)]
    noise = x = torch.randn(4, 3, dtype=torch.float64)
    for index in theirs.timesteps:
        eps = teacher(x, at((int(index) + 1) / 1000, x), {}, want="eps")
        x = theirs.step(eps, index, x).prev_sample
    ours = Sampler(trailing(steps), DpmPP2M()).run(teacher, noise, {}, rng())
    assert_close(ours, x.double(), rtol=2e-5, atol=2e-5)  # their sigmas are float32
    first_order = Sampler(trailing(steps), Ddim()).run(teacher, noise, {}, rng())
    assert not torch.allclose(first_order, ours, rtol=1e-3, atol=1e-3)


def test_ddim_on_a_flow_matches_diffusers_euler() -> None:
    theirs = FlowMatchEulerDiscreteScheduler()
    teacher = GaussianTeacher(MEAN, COV, RectifiedFlow())
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    noise = x = torch.randn(4, 3, dtype=torch.float64)
    for index in theirs.timesteps:
        x = theirs.step(teacher(x, at(float(index) / 1000, x), {}, want="velocity"), index, x).prev_sample
    ours = Sampler(trailing(4), Ddim()).run(teacher, noise, {}, rng())
    assert_close(ours, x.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpm++"])
def test_deterministic_rules_draw_nothing(name: str) -> None:
    teacher = GaussianTeacher(MEAN, COV, RectifiedFlow())
    generator = rng()
    Sampler(trailing(4), RULES[name]).run(teacher, torch.randn(2, 3), {}, generator)
    assert_close(torch.rand(3, generator=generator), torch.rand(3, generator=rng()), rtol=0, atol=0)


# Stochastic rules


@pytest.mark.parametrize("rule", [Renoise(), *(Tcd(g, n) for g in (0.1, 0.5, 1.0) for n in (0, 1000))], ids=str)
def test_fresh_noise_restores_exactly_the_variance_of_the_path(schedule: Schedule, rule: StepRule) -> None:
    """With the true x0 the result is alpha_s x0 + a eps + b z; eps = 0 shows b, and a^2 + b^2 must be sigma_s^2."""
    x0, eps = torch.randn(3, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)
    t, s = (torch.tensor(u, dtype=torch.float64) * schedule.t_max for u in ([0.9, 0.75, 0.4], [0.5, 0.25, 0.04]))
    known = Known(schedule, x0)

    def step(noise: Tensor) -> Tensor:
        return rule(known, schedule.add_noise(x0, noise, t), Move(t, s, {}, rng(3)))[0]

    c_s = schedule.coeffs(s, x0)
    fresh = step(0 * eps) - c_s.alpha * x0
    a, b = step(eps) - step(0 * eps), fresh / torch.randn(3, 4, generator=rng(3), dtype=torch.float64)
    assert_close(a**2 + b**2, (c_s.sigma**2).expand(3, 4), rtol=1e-9, atol=1e-11)
    assert bool((b > 0).all())
    assert bool((a >= -1e-12).all())


def test_renoise_keeps_nothing_of_the_old_noise_and_tcd_as_much_as_it_says() -> None:
    schedule = RectifiedFlow()
    x0, z = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, generator=rng(3), dtype=torch.float64)
    eps, t, s = torch.randn(2, 3, dtype=torch.float64), at(0.8, x0), at(0.5, x0)
    x_t = schedule.add_noise(x0, eps, t)
    renoised, estimate = Renoise()(Known(schedule, x0), x_t, Move(t, s, {}, rng(3)))
    assert_close(renoised, 0.5 * x0 + 0.5 * z, **TIGHT)
    assert_close(estimate, x0, **TIGHT)
    assert_close(Tcd(1.0, table=0)(Known(schedule, x0), x_t, Move(t, s, {}, rng(3)))[0], renoised, **TIGHT)
    half = Tcd(0.5, table=0)(Known(schedule, x0), x_t, Move(t, s, {}, rng(3)))[0]  # down to .25, back up to .5
    ratio = 0.5 / 0.75
    by_hand = ratio * (0.75 * x0 + 0.25 * eps) + math.sqrt(0.25 - (ratio * 0.25) ** 2) * z
    assert_close(half, by_hand, **TIGHT)


def test_tcd_without_noise_is_ddim_bit_for_bit() -> None:
    teacher = GaussianTeacher(MEAN, COV, DiscreteVP.scaled_linear())
    noise, generator = torch.randn(4, 3), rng()
    a = Sampler(trailing(4), Tcd(0.0)).run(teacher, noise, {}, generator)
    b = Sampler(trailing(4), Ddim()).run(teacher, noise, {}, rng())
    assert_close(a, b, rtol=0, atol=0)
    assert_close(torch.rand(3, generator=generator), torch.rand(3, generator=rng()), rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_one_tcd_step_matches_diffusers(gamma: float, position: int) -> None:
    theirs = TCDScheduler()
    theirs.set_timesteps(timesteps=[999, 749, 499, 249])
    teacher = GaussianTeacher(MEAN, COV, DiscreteVP(theirs.alphas_cumprod))
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    x = torch.randn(4, 3, dtype=torch.float64)
    index = int(theirs.timesteps[position])
    t, s = at(trailing(4)[position], x), at(trailing(4)[position + 1], x)
    expected = theirs.step(teacher(x, t, {}, want="eps"), index, x, eta=gamma, generator=rng(5)).prev_sample
    ours, x0 = Tcd(gamma)(teacher, x, Move(t, s, {}, rng(5)))
    assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    assert_close(x0, teacher(x, t, {}), **TIGHT)


@pytest.mark.parametrize("gamma", [0.1, 0.25, 0.3, 0.5, 0.9])
def test_tcd_aims_below_at_the_entry_that_diffusers_rounds_to(gamma: float) -> None:
    index = torch.arange(1000)
    below = Tcd(gamma).below((index + 1).double() / 1000, 1.0)
    expected = [math.floor(round((1 - gamma) * i, 9)) for i in range(1000)]
    assert [round(float(u) * 1000) - 1 for u in below] == expected
    assert float(Tcd(gamma).below(torch.zeros(1, dtype=torch.float64), 1.0)) == 0
    assert_close(Tcd(gamma, table=0).below(torch.tensor([40.0]), 80.0), torch.tensor([40.0 * (1 - gamma)]))


def test_a_perfect_denoiser_under_renoising_underdisperses_by_the_golden_amounts() -> None:
    """Flow, variance 1.4, times 1, .75, .5, .25: variances 0, .163092, .395774, .435084.

    The run is linear in its noises, which the seed gives back; their coefficients are fitted exactly.
    """
    teacher = GaussianTeacher(torch.zeros(1), torch.tensor([[1.4]], dtype=torch.float64), RectifiedFlow())
    for steps, golden in zip((1, 2, 3, 4), (0.0, 0.163092, 0.395774, 0.435084), strict=True):
        noise = torch.randn(64, 1, dtype=torch.float64)
        out = Sampler(trailing(4)[:steps], Renoise()).run(teacher, noise, {}, rng(7))
        generator = rng(7)
        drawn = [torch.randn(64, 1, generator=generator, dtype=torch.float64) for _ in range(steps - 1)]
        noises = torch.cat([noise, *drawn], 1)
        coefficients = torch.linalg.lstsq(noises, out).solution
        assert_close(noises @ coefficients, out, **TIGHT)
        assert_close(float(coefficients.square().sum()), golden, rtol=0, atol=5e-7)


# The loop


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_costs_the_network_calls_it_states(rule: StepRule) -> None:
    for steps in (1, 2, 5):
        teacher = Counting(GaussianTeacher(MEAN, COV, RectifiedFlow()))
        sampler = Sampler(trailing(steps), rule)
        sampler.run(teacher, torch.randn(2, 3), {}, rng())
        assert len(teacher.times) == sampler.evaluations
        assert sampler.steps == steps
    assert Sampler(trailing(5), Heun()).evaluations == 9
    assert Sampler(trailing(5), Tcd()).evaluations == 5


def test_the_network_is_asked_at_the_grids_times_from_the_top(schedule: Schedule) -> None:
    teacher = Counting(GaussianTeacher(MEAN, COV, schedule))
    grid = (0.9, 0.5, 0.2)
    Sampler(grid, Renoise()).run(teacher, torch.randn(2, 3), {}, rng())
    assert_close(teacher.times, [u * schedule.t_max for u in grid], **TIGHT)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_stopping_early_gives_the_states_of_the_whole_run(rule: StepRule) -> None:
    schedule = TrigFlow(0.5)
    noise = torch.randn(3, 3, dtype=torch.float64)
    sampler = Sampler((0.95, 0.7, 0.4, 0.1), rule)
    teacher = Counting(GaussianTeacher(MEAN, COV, schedule))
    path = sampler.run(teacher, noise, {}, rng(1), path=True)
    assert path.shape == (3, 5, 3)
    assert_close(path[:, 0], 0.5 * noise, rtol=0, atol=0)  # noise of the prior's size
    assert_close(path[:, -1], sampler.run(teacher, noise, {}, rng(1)), rtol=0, atol=0)
    for stop in range(4):
        teacher.times.clear()
        # (the last step of a whole run may be cheaper, the ones before it are the same)
        assert_close(sampler.run(teacher, noise, {}, rng(1), stop=stop), path[:, stop], rtol=0, atol=0)
        assert bool(torch.tensor(teacher.times or [9.0]).min() > 0.999 * sampler.times[stop] * schedule.t_max)


def test_conditions_reach_the_predictor() -> None:
    means = torch.tensor([[5.0, 0.0, 0.0], [0.0, -5.0, 0.0]])
    teacher = GaussianTeacher(MEAN, 0.01 * COV, RectifiedFlow(), means)
    out = Sampler().run(teacher, torch.randn(2, 3), {"labels": torch.tensor([0, 1])}, rng())
    assert_close(out.round(), means)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_sample_depends_on_its_number_and_the_seed_and_not_on_its_batch(rule: StepRule) -> None:
    """A CPU generator keeps the low 32 bits of its seed, so a run's seed in the high ones would be lost."""
    means = torch.tensor([[2.0, 0.0, 0.0], [0.0, -2.0, 0.0]])
    teacher = GaussianTeacher(MEAN, COV, DiscreteVP.linear(), means)
    cond = {"labels": torch.arange(7) % 3}
    sampler = Sampler(trailing(3), rule)
    whole = sample(teacher, (7, 3), cond, sampler, seed=4, batch=7)
    assert_close(sample(teacher, (7, 3), cond, sampler, seed=4, batch=3), whole, rtol=1e-6, atol=1e-6)
    assert_close(sample(teacher, (7, 3), cond, sampler, seed=4, batch=1), whole, rtol=1e-6, atol=1e-6)
    tail = {"labels": cond["labels"][5:]}
    assert_close(sample(teacher, (2, 3), tail, sampler, seed=4, first=5), whole[5:], rtol=1e-6, atol=1e-6)
    other = sample(teacher, (7, 3), cond, sampler, seed=5)
    assert bool(((other - whole).abs().amax(1) > 1e-3).all())
    assert len({round(float(v), 6) for v in whole.flatten()}) == 21  # no two alike
    assert (whole.dtype, whole.requires_grad) == (torch.float32, False)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_sample_is_the_same_on_the_gpu(rule: StepRule) -> None:
    means = torch.tensor([[2.0, 0.0, 0.0], [0.0, -2.0, 0.0]])
    teacher, cond = GaussianTeacher(MEAN, COV, DiscreteVP.linear(), means), {"labels": torch.arange(7) % 3}
    here = sample(teacher, (7, 3), cond, Sampler(trailing(3), rule), seed=4)
    there = sample(teacher.to("cuda"), (7, 3), cond, Sampler(trailing(3), rule), seed=4, device="cuda")
    assert_close(there.cpu(), here, rtol=1e-4, atol=1e-4)


def test_sample_generators_are_distinct_and_reproducible() -> None:
    draws = [float(torch.rand((), generator=g, dtype=torch.float64)) for k in (0, 1) for g in sample_rngs(k, range(50))]
    assert len(set(draws)) == 100
    again = [float(torch.rand((), generator=g, dtype=torch.float64)) for g in sample_rngs(0, [3, 1])]
    assert again == [draws[3], draws[1]]


# Student


def test_a_student_samples_on_its_own_grid_and_refuses_another() -> None:
    student = Student(Sampler((1.0, 0.5), Renoise()), mlp(2, 16, 2, classes=2), RectifiedFlow(), "velocity")
    cond = {"labels": torch.tensor([0, 1, 2])}
    expected = sample(student, (3, 2), cond, Sampler((1.0, 0.5), Renoise()), seed=3)
    assert_close(student.sample((3, 2), cond, seed=3), expected, rtol=0, atol=0)
    assert_close(student.sample((3, 2), cond, seed=3, steps=2), expected, rtol=0, atol=0)
    assert isinstance(student, Denoiser)
    with pytest.raises(ValueError, match=r"steps 4: this student was trained for 2 \(times 1, 0\.5\)"):
        student.sample((3, 2), cond, steps=4)
