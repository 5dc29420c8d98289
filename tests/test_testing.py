"""The exact teachers against golden numbers, quadrature, autodiff, matrix formulas and a fine ODE solver."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.models.denoiser import Denoiser, Guided
from stepdistill.sampling import Ddim, Sampler, sample
from stepdistill.schedule import EDM, KINDS, DiscreteVP, RectifiedFlow, Schedule, TrigFlow
from stepdistill.testing import (
    ExactTeacher,
    GaussianTeacher,
    MixtureTeacher,
    energy_distance,
    exact_student,
    fit_network,
    mlp,
    sliced_wasserstein,
)

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
MEAN = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
COV = torch.tensor([[1.4, 0.3, -0.2], [0.3, 0.5, 0.1], [-0.2, 0.1, 0.25]], dtype=torch.float64)
MEANS = torch.tensor([[1.0, 0.0, 2.0], [-1.0, 0.5, 0.0]], dtype=torch.float64)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def line(mean: float, std: float, schedule: Schedule) -> GaussianTeacher:
    return GaussianTeacher(times(mean), column(std**2), schedule)


def three_modes(schedule: Schedule) -> MixtureTeacher:
    return MixtureTeacher(times(0.2, 0.5, 0.3), column(-1.0, 0.5, 2.0), times(0.3, 0.5, 0.2), schedule)


def gaussian(schedule: Schedule) -> GaussianTeacher:
    return GaussianTeacher(MEAN, COV, schedule, MEANS)


def plane(schedule: Schedule) -> MixtureTeacher:
    means = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [0.2, -1.0]], dtype=torch.float64)
    return MixtureTeacher(times(0.2, 0.5, 0.3), means, times(0.3, 0.5, 0.2), schedule)


def runge_kutta(teacher: ExactTeacher, x: Tensor, t: float, s: float, steps: int = 200) -> Tensor:
    """Fourth-order integration of the teacher's velocity, with cond absent."""
    h = (s - t) / steps
    for i in range(steps):
        u = t + i * h

        def slope(x: Tensor, time: float) -> Tensor:
            return teacher(x, torch.full((len(x),), time, dtype=torch.float64), want="velocity")

        k1 = slope(x, u)
        k2 = slope(x + h / 2 * k1, u + h / 2)
        k3 = slope(x + h / 2 * k2, u + h / 2)
        k4 = slope(x + h * k3, u + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


# Both teachers


@pytest.mark.parametrize("make", [gaussian, plane])
def test_all_kinds_come_from_one_pair_of_estimates(schedule: Schedule, interior: Tensor, make: object) -> None:
    teacher = make(schedule)
    x_t = torch.randn(9, teacher.dim, dtype=torch.float64)
    c = schedule.coeffs(interior, x_t)
    x0, eps, v, u = (teacher(x_t, interior, want=kind) for kind in KINDS)
    assert_close(c.alpha * x0 + c.sigma * eps, x_t, **TIGHT)
    assert_close(v, c.alpha * eps - c.sigma * x0, **TIGHT)
    assert_close(u, c.dalpha * x0 + c.dsigma * eps, **TIGHT)


@pytest.mark.parametrize("make", [gaussian, plane])
def test_the_score_is_the_gradient_of_the_log_density(schedule: Schedule, interior: Tensor, make: object) -> None:
    teacher = make(schedule)
    x_t = torch.randn(9, teacher.dim, dtype=torch.float64, requires_grad=True)
    cond = {"labels": torch.arange(9) % (teacher.null + 1)}
    (score,) = torch.autograd.grad(teacher.log_density(x_t, interior, cond).sum(), x_t)
    eps = teacher(x_t, interior, cond, want="eps")
    assert_close(eps.detach(), -schedule.coeffs(interior, x_t).sigma * score, **TIGHT)


@pytest.mark.parametrize("make", [lambda s: line(0.7, 0.6, s), three_modes])
def test_the_estimate_is_the_posterior_mean_by_quadrature(make: object) -> None:
    for schedule in (RectifiedFlow(), EDM(4.0), TrigFlow(0.5)):
        teacher = make(schedule)
        z = torch.linspace(-6, 6, 48001, dtype=torch.float64)[:, None]
        data = teacher.log_density(z, torch.zeros(len(z)))  # log p(x0)
        assert_close(data.exp().sum() * (z[1] - z[0])[0], torch.tensor(1.0, dtype=torch.float64), **TIGHT)
        for share, x in ((0.2, -0.4), (0.5, 0.9), (0.8, 1.6)):
            t = times(share * schedule.t_max)
            c = schedule(t)
            weight = (data - (x - c.alpha * z[:, 0]) ** 2 / (2 * c.sigma**2)).softmax(0)
            assert_close(teacher(column(x), t)[0, 0], (weight * z[:, 0]).sum(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("make", [gaussian, plane])
def test_at_the_ends_predictions_are_finite_and_right(schedule: Schedule, make: object) -> None:
    teacher = make(schedule)
    x_t = torch.randn(2, teacher.dim, dtype=torch.float64)
    start, end = torch.zeros(2), torch.full((2,), schedule.t_max, dtype=torch.float64)
    assert_close(teacher(x_t, start), x_t, **TIGHT)
    assert_close(teacher(x_t, start, want="eps"), torch.zeros_like(x_t), **TIGHT)
    for kind in KINDS:
        assert bool(teacher(x_t, end, want=kind).isfinite().all())
    if abs(float(schedule(end).alpha[0])) < 1e-12:  # nothing left of the data: the answer is its mean
        mean = teacher.mean if isinstance(teacher, GaussianTeacher) else teacher.log_weights[-1].exp() @ teacher.means
        assert_close(teacher(x_t, end), mean.expand(2, -1), **TIGHT)


@pytest.mark.parametrize("make", [gaussian, plane])
def test_any_sample_shape_and_float32_give_the_same_numbers(make: object) -> None:
    teacher = make(TrigFlow())
    x_t, t = torch.randn(4, teacher.dim, 1), torch.rand(4) + 0.1
    exact = teacher(x_t.double().flatten(1), t, want="v")
    answer = teacher(x_t, t, want="v")
    assert (answer.dtype, answer.shape) == (torch.float32, x_t.shape)
    assert_close(answer.flatten(1).double(), exact, rtol=1e-6, atol=1e-6)
    assert teacher.log_density(x_t, t).shape == (4,)
    with pytest.raises(ValueError, match=f"{teacher.dim} numbers each"):
        teacher(torch.zeros(4, teacher.dim + 1), t)
    with pytest.raises(ValueError, match="'noise'"):
        teacher(x_t, t, want="noise")


@pytest.mark.parametrize("make", [gaussian, plane])
def test_gradients_flow_to_the_sample(make: object) -> None:
    teacher = make(RectifiedFlow())
    t = times(0.4, 0.7)
    x_t = torch.randn(2, teacher.dim, dtype=torch.float64, requires_grad=True)
    for kind in KINDS:
        assert torch.autograd.gradcheck(lambda x, k=kind: teacher(x, t, want=k), x_t)
    assert list(teacher.parameters()) == []


@pytest.mark.parametrize("make", [gaussian, plane])
def test_samples_have_the_teachers_law(make: object) -> None:
    """Distribution of x_t of sampled data against the closed density: mean log density is minus the entropy."""
    teacher = make(RectifiedFlow())
    generator = torch.Generator().manual_seed(1)
    for cond in (None, {"labels": torch.arange(60000) % (teacher.null + 1)}):
        x0 = teacher.sample(60000, generator, cond, dtype=torch.float64)
        again = teacher.sample(60000, torch.Generator().manual_seed(2), cond, dtype=torch.float64)
        assert_close(x0.mean(0), again.mean(0), rtol=0, atol=0.03)
        score = -teacher(x0, torch.full((60000,), 0.01), cond, want="eps") / 0.01
        # Stein: E[score x^T] = -I for the true density
        stein = (score[:, :, None] * x0[:, None]).mean(0)
        assert_close(stein, -torch.eye(teacher.dim, dtype=torch.float64), rtol=0, atol=0.12)
    assert teacher.sample(5, generator).dtype == torch.float32


# Gaussian


def test_the_gaussian_follows_the_matrix_formulas(schedule: Schedule, interior: Tensor) -> None:
    teacher = gaussian(schedule)
    x_t = torch.randn(9, 3, dtype=torch.float64)
    labels = torch.arange(9) % 3
    x0 = teacher(x_t, interior, {"labels": labels})
    c = schedule(interior)
    for i in range(9):
        a, s, m = c.alpha[i], c.sigma[i], (*MEANS, MEAN)[labels[i]]
        noised = a**2 * COV + s**2 * torch.eye(3, dtype=torch.float64)
        assert_close(x0[i], m + a * COV @ torch.linalg.inv(noised) @ (x_t[i] - a * m), **TIGHT)
        reference = torch.distributions.MultivariateNormal(a * m, noised).log_prob(x_t[i])
        density = teacher.log_density(x_t[i : i + 1], interior[i : i + 1], {"labels": labels[i : i + 1]})[0]
        assert_close(density, reference, **TIGHT)
    assert_close(teacher.cov, COV, **TIGHT)


def test_golden_ode_maps_of_a_gaussian() -> None:
    x = column(1.3)
    flow, edm, trig = (line(0.7, 0.6, s) for s in (RectifiedFlow(), EDM(), TrigFlow()))
    assert_close(flow.flow_map(x, times(0.95), times(0.1)), column(1.3609137820757893), rtol=0, atol=1e-12)
    assert_close(edm.flow_map(x, times(20), times(0.01)), column(0.7179944041656522), rtol=0, atol=1e-12)
    assert_close(trig.flow_map(x, times(1.5), times(0.05)), column(1.4522865646272), rtol=0, atol=1e-12)
    velocity = line(0.4, 0.7, RectifiedFlow())(column(1.1), times(0.8), want="velocity")
    assert_close(velocity, column(0.68556701), rtol=0, atol=5e-9)
    lower = line(0.4, 0.7, RectifiedFlow()).flow_map(column(1.1), times(0.8), times(0.3))
    assert_close((column(1.1) - lower) / (0.8 - 0.3), column(0.19684624), rtol=0, atol=5e-9)


def test_the_gaussian_ode_map_solves_the_ode() -> None:
    for schedule in (RectifiedFlow(), EDM(3.0), TrigFlow(0.5)):
        teacher = gaussian(schedule)
        x = torch.randn(4, 3, dtype=torch.float64)
        t, s = 0.9 * schedule.t_max, 0.1 * schedule.t_max
        exact = teacher.flow_map(x, torch.full((4,), t), torch.full((4,), s))
        assert_close(exact, runge_kutta(teacher, x, t, s), rtol=1e-7, atol=1e-7)


def test_the_gaussian_ode_map_composes_and_inverts(schedule: Schedule) -> None:
    teacher = gaussian(schedule)
    x = torch.randn(3, 3, dtype=torch.float64)
    cond = {"labels": torch.tensor([0, 1, 2])}
    t, u, s = (torch.full((3,), f * schedule.t_max, dtype=torch.float64) for f in (0.9, 0.4, 0.1))
    direct = teacher.flow_map(x, t, s, cond)
    assert_close(teacher.flow_map(teacher.flow_map(x, t, u, cond), u, s, cond), direct, **TIGHT)
    assert_close(teacher.flow_map(direct, s, t, cond), x, **TIGHT)
    assert_close(teacher.consistency(x, t, cond), teacher.flow_map(x, t, 0 * t, cond), rtol=0, atol=0)
    assert_close(teacher.consistency(x, 0 * t, cond), x, **TIGHT)


def test_trigflow_at_matching_variance_stands_still() -> None:
    teacher = GaussianTeacher(torch.zeros(2), 0.25 * torch.eye(2), TrigFlow(0.5))
    x, t = torch.randn(3, 2, dtype=torch.float64), times(0.1, 0.8, 1.5)
    assert_close(teacher(x, t, want="velocity"), torch.zeros_like(x), **TIGHT)
    assert_close(teacher.consistency(x, t), x, **TIGHT)


def test_guidance_of_a_gaussian_is_a_gaussian_of_the_extrapolated_mean(schedule: Schedule, interior: Tensor) -> None:
    teacher = gaussian(schedule)
    guided = Guided(teacher, 2.5, {"labels": torch.tensor([teacher.null])})
    x_t, labels = torch.randn(9, 3, dtype=torch.float64), torch.ones(9, dtype=torch.int64)
    extrapolated = GaussianTeacher(MEAN + 2.5 * (MEANS[1] - MEAN), COV, schedule)
    for kind in KINDS:
        answer = guided(x_t, interior, {"labels": labels}, want=kind)
        assert_close(answer, extrapolated(x_t, interior, want=kind), **TIGHT)
        assert_close(teacher.given(1, 2.5)(x_t, interior, want=kind), answer, **TIGHT)


def test_ddim_contractions_never_exceed_the_exact_map(schedule: Schedule) -> None:
    teacher = gaussian(schedule)
    t = torch.tensor([1.0, 0.8, 0.5, 0.2]) * schedule.t_max
    s = torch.tensor([0.7, 0.1, 0.45, 0.0]) * schedule.t_max
    c_t, c_s = schedule(t), schedule(s)
    eigenvalues = torch.linalg.eigvalsh(COV)
    for i in range(4):
        v_t, v_s = (c.alpha[i] ** 2 * eigenvalues + c.sigma[i] ** 2 for c in (c_t, c_s))
        factor = teacher.ddim_contraction(t, s)[i]
        assert_close(factor * v_t, c_t.alpha[i] * c_s.alpha[i] * eigenvalues + c_t.sigma[i] * c_s.sigma[i], **TIGHT)
        assert bool((factor <= (v_s / v_t).sqrt() + 1e-12).all())
    # there and back loses 1 - c^2 (a_t s_s - a_s s_t)^2 / (V_t V_s)
    lost = 1 - eigenvalues * (c_t.alpha[2] * c_s.sigma[2] - c_s.alpha[2] * c_t.sigma[2]) ** 2 / (
        (c_t.alpha[2] ** 2 * eigenvalues + c_t.sigma[2] ** 2) * (c_s.alpha[2] ** 2 * eigenvalues + c_s.sigma[2] ** 2)
    )
    assert_close((teacher.ddim_contraction(t, s) * teacher.ddim_contraction(s, t))[2], lost, **TIGHT)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_ddim_law_is_what_the_sampler_produces(schedule: Schedule, steps: int) -> None:
    """The run is affine in the noise, so mean and covariance follow from the images of 0 and of the unit vectors."""
    teacher = gaussian(schedule)
    grid = tuple(0.99 * (1 - i / steps) for i in range(steps))
    noise = torch.cat([torch.zeros(1, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)])
    out = Sampler(grid, Ddim()).run(teacher, noise, {}, torch.Generator())
    columns = out[1:] - out[0]  # row j is the image of unit vector j
    mean, cov = teacher.ddim_law(grid)
    assert_close(mean, out[0], **TIGHT)
    assert_close(cov, columns.T @ columns, **TIGHT)


def test_one_ddim_step_from_pure_noise_gives_the_mean_alone() -> None:
    mean, cov = gaussian(RectifiedFlow()).ddim_law((1.0,))
    assert_close(mean, MEAN, **TIGHT)
    assert_close(cov, torch.zeros(3, 3, dtype=torch.float64), **TIGHT)
    fine_mean, fine_cov = gaussian(RectifiedFlow()).ddim_law(tuple(1 - i / 2000 for i in range(2000)))
    assert_close(fine_mean, MEAN, **TIGHT)
    assert_close(fine_cov, COV, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("mean", "cov", "means", "message"),
    [
        (MEAN, COV[:2], None, "need mean"),
        (MEAN, COV, MEANS[:, :2], "need mean"),
        (MEAN[0], COV, None, "need mean"),
        (MEAN, COV - torch.eye(3), None, "positive definite"),
        (MEAN, COV + torch.tensor([[0, 0.5, 0], [0, 0, 0], [0, 0, 0]]), None, "symmetric"),
    ],
)
def test_a_gaussian_of_odd_parts_is_refused(mean: Tensor, cov: Tensor, means: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianTeacher(mean, cov, RectifiedFlow(), means)


# Mixture


def test_golden_estimates_of_a_mixture() -> None:
    """The three points of the method book, each reached by a schedule that has those alpha and sigma."""
    goldens = ((0.3, 0.7, 0.5, 0.47788026347), (-0.4, 0.2, 0.9, 0.49458852270), (1.0, 1.0, 2.0, 0.76900423313))
    for x, alpha, sigma, golden in goldens:
        # under EDM the same state is x / alpha at sigma / alpha
        teacher = three_modes(EDM())
        assert_close(teacher(column(x / alpha), times(sigma / alpha)), column(golden), rtol=0, atol=5e-11)
    # E[x0 | x] changes with x as (alpha / sigma^2) Var[x0 | x]
    x = column(0.3 / 0.7).requires_grad_()
    (slope,) = torch.autograd.grad(three_modes(EDM())(x, times(0.5 / 0.7)).sum(), x)
    assert_close((0.5 / 0.7) ** 2 * slope, column(0.395105), rtol=0, atol=5e-7)


def test_a_mixture_in_the_plane_has_torchs_density_and_the_bookkeeping_of_loops(
    schedule: Schedule, interior: Tensor
) -> None:
    teacher = plane(schedule)
    x_t, c = torch.randn(9, 2, dtype=torch.float64), schedule(interior)
    density, x0 = teacher.log_density(x_t, interior), teacher(x_t, interior)
    for i in range(9):
        a, s = c.alpha[i], c.sigma[i]
        stds = (a**2 * teacher.stds**2 + s**2).sqrt()
        parts = torch.distributions.Independent(
            torch.distributions.Normal(a * teacher.means, stds[:, None].expand(3, 2)), 1
        )
        weights = times(0.2, 0.5, 0.3)
        mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(weights), parts)
        assert_close(density[i], mixture.log_prob(x_t[i]), **TIGHT)
        share = weights * parts.log_prob(x_t[i]).exp()
        means = [
            teacher.means[k] + a * teacher.stds[k] ** 2 / stds[k] ** 2 * (x_t[i] - a * teacher.means[k])
            for k in range(3)
        ]
        by_hand = sum(share[k] * means[k] for k in range(3)) / share.sum()
        assert_close(x0[i], by_hand, **TIGHT)


def test_golden_ode_maps_of_a_mixture() -> None:
    x = column(-1.2, 0.1, 0.9)
    mapped = three_modes(RectifiedFlow()).flow_map(x, times(0.95, 0.95, 0.95), times(0.02, 0.02, 0.02))
    assert_close(mapped, column(-0.9910478003, 0.6876543612, 1.9099986562), rtol=0, atol=5e-11)


def test_the_mixture_ode_map_solves_the_ode() -> None:
    for schedule in (RectifiedFlow(), EDM(3.0), TrigFlow(0.5)):
        teacher = three_modes(schedule)
        x = column(-2.0, -0.3, 0.4, 2.5)
        t, s = 0.9 * schedule.t_max, 0.05 * schedule.t_max
        exact = teacher.flow_map(x, torch.full((4,), t, dtype=torch.float64), torch.full((4,), s, dtype=torch.float64))
        assert_close(exact, runge_kutta(teacher, x, t, s), rtol=1e-6, atol=1e-6)


def test_the_mixture_ode_map_keeps_its_digits_in_both_tails() -> None:
    teacher = three_modes(RectifiedFlow())
    x = column(-7.0, -1.0, 1.0, 7.0)
    t, s = torch.full((4,), 0.9, dtype=torch.float64), torch.full((4,), 0.6, dtype=torch.float64)
    there = teacher.flow_map(x, t, s)
    assert_close(teacher.flow_map(there, s, t), x, rtol=1e-9, atol=1e-9)
    assert_close(teacher.consistency(x, 0 * t), x, rtol=1e-9, atol=1e-9)


def test_the_distribution_function_integrates_the_density() -> None:
    teacher = three_modes(TrigFlow(0.5))
    x, t = column(-1.0, 0.3, 1.9).requires_grad_(), times(0.2, 0.9, 1.5)
    (density,) = torch.autograd.grad(teacher.cdf(x, t).sum(), x)
    assert_close(density[:, 0], teacher.log_density(x, t).exp().detach(), **TIGHT)
    far = teacher.cdf(column(-50.0, 50.0), times(0.2, 0.2))
    assert_close(far, column(0.0, 1.0), **TIGHT)


def test_exact_flows_of_mixtures_need_a_line() -> None:
    with pytest.raises(ValueError, match="2 dims"):
        plane(EDM()).consistency(torch.zeros(1, 2), torch.ones(1))
    with pytest.raises(ValueError, match="2 dims"):
        plane(EDM()).cdf(torch.zeros(1, 2), torch.ones(1))


def test_a_mixture_of_one_is_a_gaussian(schedule: Schedule, interior: Tensor) -> None:
    one = MixtureTeacher(times(3.0), column(0.7), times(0.6), schedule)
    normal = line(0.7, 0.6, schedule)
    x = torch.randn(9, 1, dtype=torch.float64)
    for kind in KINDS:
        assert_close(one(x, interior, want=kind), normal(x, interior, want=kind), **TIGHT)
    assert_close(one.log_density(x, interior), normal.log_density(x, interior), **TIGHT)
    assert_close(one.consistency(x, interior), normal.consistency(x, interior), **TIGHT)


def test_a_label_picks_one_component() -> None:
    teacher = plane(RectifiedFlow())
    x, t = torch.randn(4, 2, dtype=torch.float64), times(0.2, 0.4, 0.6, 0.8)
    labels = {"labels": torch.tensor([0, 1, 2, 3])}
    answer = teacher(x, t, labels)
    for k in range(3):
        alone = MixtureTeacher(times(1.0), teacher.means[k : k + 1], teacher.stds[k : k + 1], teacher.schedule)
        assert_close(answer[k], alone(x, t)[k], **TIGHT)
    assert_close(answer[3], teacher(x, t)[3], **TIGHT)
    drawn = teacher.sample(3000, torch.Generator().manual_seed(0), {"labels": torch.full((3000,), 2)})
    assert_close(drawn.mean(0).double(), teacher.means[2], rtol=0, atol=0.02)


def test_the_mixture_stays_finite_far_from_every_mode() -> None:
    teacher = plane(RectifiedFlow())
    x = torch.tensor([[1e4, -1e4]], dtype=torch.float64, requires_grad=True)
    for t in (1e-3, 0.5, 1.0):
        for kind in KINDS:
            out = teacher(x, times(t), want=kind)
            (grad,) = torch.autograd.grad(out.sum(), x)
            assert bool(out.isfinite().all() and grad.isfinite().all())


def test_the_ring_has_equal_modes_on_a_circle() -> None:
    ring = MixtureTeacher.ring(EDM(), modes=8, radius=2.0, std=0.05)
    assert_close(ring.means.norm(dim=1), torch.full((8,), 2.0, dtype=torch.float64), **TIGHT)
    assert_close(torch.pdist(ring.means).min(), torch.tensor(4 * math.sin(math.pi / 8), dtype=torch.float64), **TIGHT)
    x = ring.sample(16000, torch.Generator().manual_seed(0), dtype=torch.float64)
    distance, nearest = torch.cdist(x, ring.means).min(1)
    assert_close(nearest.bincount() / 2000, torch.ones(8), rtol=0, atol=0.08)
    assert_close(distance.square().mean(), torch.tensor(2 * 0.05**2, dtype=torch.float64), rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("weights", "means", "stds", "message"),
    [
        ([1.0], [[0.0], [1.0]], [1.0, 1.0], "need weights"),
        ([1.0, 1.0], [0.0, 1.0], [1.0, 1.0], "need weights"),
        ([1.0, 0.0], [[0.0], [1.0]], [1.0, 1.0], "must be positive"),
        ([1.0, 1.0], [[0.0], [1.0]], [1.0, 0.0], "must be positive"),
    ],
)
def test_a_mixture_of_odd_parts_is_refused(weights: list, means: list, stds: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureTeacher(torch.tensor(weights), torch.tensor(means), torch.tensor(stds), RectifiedFlow())


# Students, networks, distances


def test_the_exact_student_samples_the_data_in_one_step() -> None:
    teacher = gaussian(RectifiedFlow())
    student = exact_student(teacher, Sampler((1.0,)))
    x = sample(student, (4000, 3), {}, student.sampler)
    assert_close(x.double().mean(0), MEAN, rtol=0, atol=0.06)
    assert_close(x.T.double().cov(), COV, rtol=0, atol=0.1)
    z, t = torch.randn(5, 3), torch.full((5,), 0.7)
    student(z, t, {}).sum().backward()
    assert_close(student.net.shift.grad, torch.full((3,), 5.0))
    assert_close(student.net.scale.grad, teacher.consistency(z, t).sum())
    assert [name for name, _ in student.named_parameters()] == ["net.scale", "net.shift"]


def test_the_small_network_takes_labels_and_any_shape() -> None:
    net = mlp(4, width=16, depth=2, classes=3)
    x, t = torch.randn(5, 1, 2, 2), torch.rand(5)
    assert net(x, t).shape == x.shape
    labelled = net(x, t, labels=torch.tensor([0, 1, 2, 3, 3]))
    assert not torch.allclose(labelled, net(x, t, labels=torch.tensor([1, 1, 2, 3, 3])))
    assert not torch.allclose(net(x, t), net(x, 1 - t))
    assert len([m for m in mlp(4, depth=5).modules() if isinstance(m, torch.nn.Linear)]) == 6


def test_a_few_seconds_of_fitting_make_a_denoiser() -> None:
    schedule = RectifiedFlow()
    teacher = MixtureTeacher.ring(schedule, std=0.2)
    denoiser = Denoiser(mlp(2, width=64), schedule, "velocity")
    x0 = teacher.sample(2000, torch.Generator().manual_seed(5))
    t = torch.linspace(0.05, 1, 2000, dtype=torch.float64)
    x_t = schedule.add_noise(x0, torch.randn(2000, 2), t)

    def error() -> float:
        with torch.no_grad():
            return float((denoiser(x_t, t, {}) - teacher(x_t, t)).square().mean())

    before = error()
    last = fit_network(denoiser, teacher, 600, batch=256)
    assert error() < 0.02 * before
    assert last < 0.05


def test_fitting_honours_labels_and_foreign_schedules_and_repeats() -> None:
    schedule = DiscreteVP.linear()
    teacher = GaussianTeacher(torch.zeros(1), 0.01 * torch.eye(1), RectifiedFlow(), torch.tensor([[-1.0], [1.0]]))
    denoisers = []
    for _ in range(2):
        torch.manual_seed(0)
        denoisers.append(Denoiser(mlp(1, width=32, depth=2, classes=2), schedule, "x0"))
        fit_network(denoisers[-1], teacher, 300, labelled=True, batch=192)
    x_t, t = torch.zeros(3, 1), torch.full((3,), 0.9)
    with torch.no_grad():
        answers = [d(x_t, t, {"labels": torch.tensor([0, 1, 2])}) for d in denoisers]
    assert_close(answers[0], torch.tensor([[-1.0], [1.0], [0.0]]), rtol=0, atol=0.1)
    assert_close(answers[0], answers[1], rtol=0, atol=0)


def test_sliced_wasserstein_of_a_shift_is_its_length_over_root_dimension() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(500, 3, dtype=torch.float64)
    shift = torch.tensor([0.6, 0.0, -0.8], dtype=torch.float64)
    assert float(sliced_wasserstein(a, a.flip(0), generator=generator)) == 0
    measured = sliced_wasserstein(a, a + shift, 2000, generator)
    assert_close(measured, torch.tensor(1 / math.sqrt(3), dtype=torch.float64), rtol=0.03, atol=0)
    line_a, line_b = torch.randn(400, 1, dtype=torch.float64), 2 * torch.randn(400, 1, dtype=torch.float64)
    by_order = (line_a.sort(0).values - line_b.sort(0).values).square().mean().sqrt()
    assert_close(sliced_wasserstein(line_a, line_b, 3), by_order, **TIGHT)
    with pytest.raises(ValueError, match="equal shape"):
        sliced_wasserstein(a, a[1:])


def test_energy_distance_on_a_line_is_the_integral_of_the_squared_gap_of_distribution_functions() -> None:
    a, b = torch.randn(200, 1, dtype=torch.float64), 0.5 + torch.randn(150, 1, dtype=torch.float64)
    knots = torch.cat([a, b]).flatten().sort().values
    f, g = ((x.flatten() <= knots[:-1, None]).double().mean(1) for x in (a, b))
    assert_close(energy_distance(a, b), 2 * ((f - g) ** 2 * knots.diff()).sum(), rtol=1e-6, atol=1e-6)
    c = torch.randn(50, 2, 2)
    assert_close(energy_distance(c, c[torch.randperm(50)]), torch.tensor(0.0), rtol=0, atol=1e-5)
