"""Ground truth: teachers whose every prediction is a closed form, small networks, and distances between samples.

With Gaussian or mixture data the score, the ODE map and the law of a sampler's output are known exactly, so a method
can be held against numbers instead of pictures. An exact teacher is a ``Predictor`` like any other: it answers in
every kind, in float64 inside and in the dtype of its input outside, and gradients flow to the sample.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from stepdistill.models.denoiser import Cond, Denoiser, Rescheduled
from stepdistill.sampling import Sampler
from stepdistill.schedule import KINDS, Coeffs, Kind, Schedule
from stepdistill.student import Student


class ExactTeacher(nn.Module, ABC):
    """A predictor whose answers are posterior means in closed form. It has buffers and no parameters.

    Samples have any shape (B, ...) with ``dim`` numbers each. Conditions are ``{"labels": (B,)}``; none, or the last
    label ``null``, means unconditional.

    Args:
        schedule: the noise path it lives on.
    """

    dim: int
    """Numbers in one sample."""
    null: int
    """The label that stands for no label; also the number of classes."""

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule

    @abstractmethod
    def _estimates(self, x: Tensor, c: Coeffs, cond: Cond | None) -> tuple[Tensor, Tensor]:
        """``E[x0 | x_t]`` and ``E[eps | x_t]`` of flat float64 states, (B, D) each; coefficients (B, 1)."""

    @abstractmethod
    def log_density(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Log density of noised data at states ``x_t`` (B, ...) and times ``t`` (B,); (B,)."""

    @abstractmethod
    def flow_map(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        """The exact probability-flow ODE solution at times ``s`` (B,), from ``x_t`` (B, ...) at ``t`` (B,)."""

    @abstractmethod
    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        cond: Cond | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Data, (n, D); ``cond`` holds n labels."""

    def consistency(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The exact consistency function, ``flow_map`` to the data; (B, ...)."""
        return self.flow_map(x_t, t, torch.zeros_like(t), cond)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None, *, want: Kind = "x0") -> Tensor:
        """The exact prediction of kind ``want``, finite at both ends of every schedule.

        Args:
            x_t: noised samples, (B, ...).
            t: their times, (B,).
            cond: ``{"labels": (B,)}``, or nothing.
            want: kind of prediction to return.

        Returns:
            (B, ...), the dtype of ``x_t``.

        Raises:
            ValueError: if ``x_t`` is not made of ``dim`` numbers per sample, or ``want`` is no kind.
        """
        x, c = self._flat(x_t, t)
        x0, eps = self._estimates(x, c, cond)
        if want == "x0":
            answer = x0
        elif want == "eps":
            answer = eps
        elif want == "v":
            answer = c.alpha * eps - c.sigma * x0
        elif want == "velocity":
            answer = c.dalpha * x0 + c.dsigma * eps
        else:
            raise ValueError(f"want must be one of {', '.join(KINDS)}; got {want!r}")
        return answer.view(x_t.shape).to(x_t.dtype)

    def _flat(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Coeffs]:
        x = x_t.double().flatten(1)
        if x.shape[1] != self.dim:
            raise ValueError(f"this teacher's samples have {self.dim} numbers each; got shape {tuple(x_t.shape)}")
        return x, self.schedule.coeffs(t, x)


class GaussianTeacher(ExactTeacher):
    """Data ``N(mean, cov)``, optionally with classes ``N(means[k], cov)`` that share the covariance.

    With ``V = alpha^2 cov + sigma^2``, diagonal in the eigenbasis of ``cov``, the posterior mean is
    ``m + alpha cov V^-1 (x_t - alpha m)`` and the ODE map ``alpha_s m + (V_s / V_t)^(1/2) (x_t - alpha_t m)``
    (the linear case of arXiv:2011.13456 eq. 13). Classifier-free guidance stays Gaussian: at scale w it is the
    teacher of mean ``mean + w (means[k] - mean)``, see ``given``.

    Args:
        mean: (D,), without labels or under the null label, which is the number of classes.
        cov: (D, D), symmetric and positive definite.
        schedule: the noise path.
        means: (C, D), one mean per class.

    Raises:
        ValueError: if shapes do not fit, or ``cov`` is not symmetric positive definite.
    """

    def __init__(self, mean: Tensor, cov: Tensor, schedule: Schedule, means: Tensor | None = None):
        super().__init__(schedule)
        mean, cov = mean.detach().double(), cov.detach().double()
        means = mean.new_zeros(0, *mean.shape) if means is None else means.detach().double()
        if mean.ndim != 1 or cov.shape != 2 * mean.shape or means.shape[1:] != mean.shape:
            raise ValueError(
                f"need mean (D,), cov (D, D) and means (C, D); got {tuple(mean.shape)}, {tuple(cov.shape)} and "
                f"{tuple(means.shape)}"
            )
        variances, axes = torch.linalg.eigh(cov)
        if not torch.allclose(cov, cov.T) or not bool((variances > 0).all()):
            raise ValueError(f"cov must be symmetric and positive definite; its eigenvalues are {variances.tolist()}")
        self.dim, self.null = len(mean), len(means)
        self.register_buffer("means", torch.cat([means, mean[None]]))  # (C + 1, D), the null mean last
        self.register_buffer("variances", variances)  # (D,)
        self.register_buffer("axes", axes)  # (D, D), one column per principal axis

    @property
    def mean(self) -> Tensor:
        """Mean without a label, (D,)."""
        return self.means[-1]

    @property
    def cov(self) -> Tensor:
        """Covariance, (D, D)."""
        return self.axes @ self.variances.diag() @ self.axes.T

    def given(self, label: int, scale: float = 1.0) -> GaussianTeacher:
        """The unconditional teacher that guidance towards ``label`` amounts to; ``scale`` as in ``Guided``."""
        return GaussianTeacher(self.mean + scale * (self.means[label] - self.mean), self.cov, self.schedule)

    def log_density(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """``log N(x_t; alpha m, alpha^2 cov + sigma^2)``; see ``ExactTeacher``."""
        x, c = self._flat(x_t, t)
        v = self._noised_variances(c)
        along = self._along_axes(x - c.alpha * self._centre(cond))
        return -0.5 * (along.square() / v + v.log() + math.log(2 * math.pi)).sum(1).to(x_t.dtype)

    def flow_map(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        """``alpha_s m + (V_s / V_t)^(1/2) (x_t - alpha_t m)``, in either direction; see ``ExactTeacher``."""
        x, c_t = self._flat(x_t, t)
        c_s, m = self.schedule.coeffs(s, x), self._centre(cond)
        stretch = (self._noised_variances(c_s) / self._noised_variances(c_t)).sqrt()
        x_s = c_s.alpha * m + self._from_axes(stretch * self._along_axes(x - c_t.alpha * m))
        return x_s.view(x_t.shape).to(x_t.dtype)

    def ddim_contraction(self, t: Tensor, s: Tensor) -> Tensor:
        """What one DDIM step from t to s (B,) does to ``x_t - alpha_t m`` along each principal axis, (B, D).

        ``(alpha_t alpha_s cov + sigma_t sigma_s) / V_t``; never above the exact map's ``(V_s / V_t)^(1/2)``, so coarse
        DDIM shrinks. A run of K steps multiplies by the product of K of these.
        """
        c_t, c_s = (self.schedule.coeffs(u, self.variances.expand(len(u), -1)) for u in (t, s))
        return (c_t.alpha * c_s.alpha * self.variances + c_t.sigma * c_s.sigma) / self._noised_variances(c_t)

    def ddim_law(self, times: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of a DDIM run without labels, from the prior's noise down to the data.

        Args:
            times: fractions of ``t_max`` at which the network is called, as in ``Sampler``.
        """
        grid = torch.tensor((*times, 0.0), dtype=torch.float64, device=self.mean.device) * self.schedule.t_max
        factor = self.ddim_contraction(grid[:-1], grid[1:]).prod(0)  # (D,)
        start = self.schedule(grid[:1]).alpha * self.mean  # the noise has mean 0, the state it stands for has this
        mean = self.mean - self._from_axes(factor * self._along_axes(start))
        return mean, self.axes @ (factor * self.schedule.prior_std).square().diag() @ self.axes.T

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        cond: Cond | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """``m + cov^(1/2) z``; see ``ExactTeacher``."""
        z = torch.randn(n, self.dim, generator=generator, dtype=torch.float64, device=self.mean.device)
        return (self._centre(cond) + self._from_axes(self.variances.sqrt() * z)).to(dtype)

    def _estimates(self, x: Tensor, c: Coeffs, cond: Cond | None) -> tuple[Tensor, Tensor]:
        m, v = self._centre(cond), self._noised_variances(c)
        along = self._along_axes(x - c.alpha * m)
        return m + self._from_axes(c.alpha * self.variances / v * along), self._from_axes(c.sigma / v * along)

    def _noised_variances(self, c: Coeffs) -> Tensor:
        return c.alpha**2 * self.variances + c.sigma**2  # (B, D)

    def _centre(self, cond: Cond | None) -> Tensor:
        return self.means[cond["labels"]] if cond else self.mean  # (B, D) or (D,)

    def _along_axes(self, x: Tensor) -> Tensor:
        return x @ self.axes

    def _from_axes(self, x: Tensor) -> Tensor:
        return x @ self.axes.T


class MixtureTeacher(ExactTeacher):
    """Data ``sum_k w_k N(means[k], stds[k]^2 I)``; label k picks component k, no label or label K the whole mixture.

    With ``S_k = alpha^2 stds[k]^2 + sigma^2`` and responsibilities ``r_k`` proportional to
    ``w_k N(x_t; alpha means[k], S_k I)``, the posterior mean is
    ``sum_k r_k (alpha stds[k]^2 x_t + sigma^2 means[k]) / S_k``. There is no closed ODE map, but on a line the flow
    keeps the order of points, so it is ``F_s^-1(F_t(x))`` with F the distribution functions.

    Args:
        weights: (K,), positive; divided by their sum.
        means: (K, D).
        stds: (K,), positive.
        schedule: the noise path.

    Raises:
        ValueError: if shapes do not fit, or a weight or standard deviation is not positive.
    """

    def __init__(self, weights: Tensor, means: Tensor, stds: Tensor, schedule: Schedule):
        super().__init__(schedule)
        weights, means, stds = weights.detach().double(), means.detach().double(), stds.detach().double()
        if means.ndim != 2 or weights.shape != means.shape[:1] or stds.shape != means.shape[:1]:
            raise ValueError(
                f"need weights (K,), means (K, D) and stds (K,); got {tuple(weights.shape)}, {tuple(means.shape)} and "
                f"{tuple(stds.shape)}"
            )
        if not bool((weights > 0).all() and (stds > 0).all()):
            raise ValueError(f"weights and stds must be positive; got {weights.tolist()} and {stds.tolist()}")
        self.null, self.dim = means.shape
        alone = torch.eye(len(means), dtype=torch.float64, device=means.device)
        weights = torch.cat([alone, (weights / weights.sum())[None]])
        self.register_buffer("log_weights", weights.log())  # (K + 1, K): one row per label, the whole mixture last
        self.register_buffer("means", means)  # (K, D)
        self.register_buffer("stds", stds)  # (K,)

    @classmethod
    def ring(cls, schedule: Schedule, modes: int = 8, radius: float = 1.0, std: float = 0.1) -> MixtureTeacher:
        """``modes`` equal Gaussians on a circle, the eight-Gaussians toy of the GAN literature (arXiv:1611.02163)."""
        angle = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
        means = radius * torch.stack([angle.cos(), angle.sin()], 1)
        return cls(torch.ones(modes), means, torch.full((modes,), std), schedule)

    def log_density(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Log of the noised mixture's density; see ``ExactTeacher``."""
        x, c = self._flat(x_t, t)
        return self._joint(x, c, cond)[0].logsumexp(1).to(x_t.dtype)

    def cdf(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Distribution function of noised data on a line, (B, 1).

        Raises:
            ValueError: if the data are not one-dimensional.
        """
        x, c = self._flat(x_t, t)
        return self._log_tails(x, c, cond)[0].exp().view(x_t.shape).to(x_t.dtype)

    @torch.no_grad()
    def flow_map(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        """``F_s^-1(F_t(x))`` by bisection to float64 precision; no gradient. See ``ExactTeacher``.

        Raises:
            ValueError: if the data are not one-dimensional.
        """
        x, c_t = self._flat(x_t, t)
        c_s = self.schedule.coeffs(s, x)
        left, right = self._log_tails(x, c_t, cond)
        # No point is further from a mode, in its standard deviations, than the farthest before.
        reach = self._scores(x, c_t).abs().amax(1, keepdim=True) * self._noised_variances(c_s).sqrt()
        low = (c_s.alpha * self.means.T - reach).amin(1, keepdim=True)
        high = (c_s.alpha * self.means.T + reach).amax(1, keepdim=True)
        for _ in range(100):
            middle = (low + high) / 2
            l_s, r_s = self._log_tails(middle, c_s, cond)
            too_low = torch.where(left < right, l_s < left, r_s > right)  # compare the smaller tail: it has the digits
            low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
        return ((low + high) / 2).view(x_t.shape).to(x_t.dtype)

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        cond: Cond | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """A component by its weight, then a point of it; see ``ExactTeacher``."""
        k = torch.multinomial(self._rows(cond).exp().expand(n, -1), 1, generator=generator)[:, 0]
        z = torch.randn(n, self.dim, generator=generator, dtype=torch.float64, device=self.means.device)
        return (self.means[k] + self.stds[k, None] * z).to(dtype)

    def _estimates(self, x: Tensor, c: Coeffs, cond: Cond | None) -> tuple[Tensor, Tensor]:
        log_joint, off = self._joint(x, c, cond)
        share = log_joint.softmax(1) / self._noised_variances(c)  # r_k / S_k, (B, K)
        x0 = c.alpha * (share @ self.stds.square())[:, None] * x + c.sigma**2 * (share @ self.means)
        return x0, c.sigma * (share[..., None] * off).sum(1)

    def _joint(self, x: Tensor, c: Coeffs, cond: Cond | None) -> tuple[Tensor, Tensor]:
        """Log of weight times density of each component (B, K), and ``x - alpha means[k]`` (B, K, D)."""
        off, v = x[:, None] - c.alpha[..., None] * self.means, self._noised_variances(c)
        log_normal = -0.5 * (off.square().sum(2) / v + self.dim * (2 * math.pi * v).log())
        return self._rows(cond) + log_normal, off

    def _log_tails(self, x: Tensor, c: Coeffs, cond: Cond | None) -> tuple[Tensor, Tensor]:
        """Log probability to the left and to the right of each point, (B, 1) both."""
        if self.dim != 1:
            raise ValueError(f"distribution functions and exact flows need data on a line; these have {self.dim} dims")
        z, rows = self._scores(x, c), self._rows(cond)
        left, right = (rows + torch.special.log_ndtr(u) for u in (z, -z))
        return left.logsumexp(1, keepdim=True), right.logsumexp(1, keepdim=True)

    def _scores(self, x: Tensor, c: Coeffs) -> Tensor:
        return (x - c.alpha * self.means.T) / self._noised_variances(c).sqrt()  # (B, K)

    def _noised_variances(self, c: Coeffs) -> Tensor:
        return c.alpha**2 * self.stds.square() + c.sigma**2  # (B, K)

    def _rows(self, cond: Cond | None) -> Tensor:
        return self.log_weights[cond["labels"]] if cond else self.log_weights[-1]  # (B, K) or (K,)


class _ScaledMap(nn.Module):
    """``scale * f(x_t, t) + shift`` with f an exact consistency function; scale starts at 1 and shift at 0."""

    def __init__(self, teacher: ExactTeacher):
        super().__init__()
        self._teacher = (teacher,)  # in a tuple: not part of this network
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(teacher.dim))

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        (teacher,) = self._teacher
        return self.scale * teacher.consistency(x_t, t, cond) + self.shift.view(x_t.shape[1:])


def exact_student(teacher: ExactTeacher, sampler: Sampler) -> Student:
    """A student that jumps along the teacher's exact ODE: where distribution matching and exact solvers must stay put.

    Its network has two parameters, ``scale`` (1) and ``shift`` (zeros, (D,)), so that a loss has a gradient to be zero.

    Args:
        teacher: whose map it is.
        sampler: the grid and rule that it carries.

    Returns:
        A ``Student`` of kind x0 on the teacher's schedule.
    """
    return Student(sampler, _ScaledMap(teacher), teacher.schedule, "x0")


class _MLP(nn.Module):
    def __init__(self, dim: int, width: int, depth: int, classes: int | None):
        super().__init__()
        self.register_buffer("frequencies", math.pi / 2 * 2.0 ** torch.arange(6))
        self.enter = nn.Linear(dim + 1 + 2 * 6, width)
        self.labels = None if classes is None else nn.Embedding(classes + 1, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.leave = nn.Linear(width, dim)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        waves = t[:, None] * self.frequencies
        h = self.enter(torch.cat([x_t.flatten(1), t[:, None], waves.cos(), waves.sin()], 1))
        if labels is not None:
            h = h + self.labels(labels)
        for layer in self.hidden:
            h = layer(nn.functional.silu(h))
        return self.leave(nn.functional.silu(h)).view(x_t.shape)


def mlp(dim: int, width: int = 128, depth: int = 3, classes: int | None = None) -> nn.Module:
    """A small network with Fourier features of time, ``(x_t, t, labels=None) -> (B, ...)``, as ``plain_call`` calls it.

    Made for times and states of order one: VP, rectified flow, TrigFlow. For EDM wrap it in ``Rescheduled``.

    Args:
        dim: numbers in one sample.
        width: hidden units.
        depth: hidden layers.
        classes: number of classes; label ``classes`` is the null label. None takes no labels.
    """
    return _MLP(dim, width, depth, classes)


def fit_network(
    denoiser: Denoiser,
    teacher: ExactTeacher,
    steps: int = 1000,
    *,
    labelled: bool = False,
    batch: int = 512,
    lr: float = 3e-3,
    seed: int = 0,
) -> float:
    """Regress a network onto an exact teacher, all times alike: a pretrained model in a few seconds.

    The target is the teacher's prediction itself and not a noisy sample of it, so few steps are enough.

    Args:
        denoiser: moved in place; trained in the kind it predicts, on its own schedule.
        teacher: what to imitate.
        steps: Adam updates, the learning rate falling to zero along a cosine.
        labelled: give ``labels`` to both, the null label as often as each class.
        batch: samples per update.
        lr: learning rate at the start.
        seed: of all draws.

    Returns:
        The mean loss of the last tenth of the steps.
    """
    predictor = teacher if teacher.schedule is denoiser.schedule else Rescheduled(teacher, denoiser.schedule)
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        cond = {"labels": torch.randint(teacher.null + 1, (batch,), generator=rng)} if labelled else {}
        x0, eps = teacher.sample(batch, rng, cond), torch.randn(batch, teacher.dim, generator=rng)
        share = (torch.arange(batch) + torch.rand(batch, generator=rng, dtype=torch.float64)) / batch
        t = share * denoiser.schedule.t_max
        x_t = denoiser.schedule.add_noise(x0, eps, t)
        target = predictor(x_t, t, cond, want=denoiser.kind)
        loss = (denoiser(x_t, t, cond, want=denoiser.kind) - target).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-max(steps // 10, 1) :]).mean())


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 256, generator: torch.Generator | None = None) -> Tensor:
    """Sliced 2-Wasserstein distance of two samples (Bonneel et al. 2015, doi:10.1007/s10851-014-0506-3).

    The root mean square, over random directions, of the distance between the projections; a shift by a vector u in
    D dimensions measures about ``|u| / sqrt(D)``.

    Args:
        a: (N, ...).
        b: (N, ...), as many.
        directions: how many to average over.
        generator: source of the directions.

    Returns:
        A scalar, the dtype of ``a``.

    Raises:
        ValueError: if the samples differ in shape.
    """
    if a.shape != b.shape:
        raise ValueError(f"need two samples of equal shape; got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.flatten(1), b.flatten(1)
    u = torch.randn(a.shape[1], directions, generator=generator, dtype=a.dtype, device=a.device)
    u = u / u.norm(dim=0)
    return ((a @ u).sort(0).values - (b @ u).sort(0).values).square().mean().sqrt()


def energy_distance(a: Tensor, b: Tensor) -> Tensor:
    """``2 E|x - y| - E|x - x'| - E|y - y'|`` (Szekely and Rizzo 2013, doi:10.1016/j.jspi.2013.03.018).

    Of the two empirical distributions, so it is never negative and zero only where they are the same set of points;
    two samples of one law measure about ``(1/N + 1/M) E|x - x'|``. On a line it is ``2 * integral (F - G)^2``.

    Args:
        a: (N, ...).
        b: (M, ...).

    Returns:
        A scalar, the dtype of ``a``.
    """
    a, b = a.flatten(1), b.flatten(1)
    return 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()
