"""One network with its schedule, answering in any kind of prediction; guidance and re-scheduling around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from stepdistill.models.lora import network_of
from stepdistill.models.two_time import Towards, TwoTime
from stepdistill.schedule import Kind, Schedule, convert

Cond = Mapping[str, Tensor]
"""What a network is conditioned on: named tensors with the batch first, {} for nothing."""

Call = Callable[[nn.Module, Tensor, Tensor, Cond], Tensor]
"""How a network is called: (net, x_t (B, ...), t (B,) in the schedule's time, cond) -> prediction (B, ...)."""


class Predictor(Protocol):
    """Teacher, student, critic, average, exact test teacher: whatever predicts at a noised sample."""

    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, *, want: Kind = "x0") -> Tensor:
        """The prediction of kind ``want`` at ``x_t`` (B, ...) and times ``t`` (B,); (B, ...)."""
        ...


def plain_call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Call a network that takes ``(x_t, t, **cond)`` with t in the schedule's time and in ``x_t``'s dtype."""
    return net(x_t, t.to(x_t.dtype), **cond)


class Denoiser(nn.Module):
    """One network, its schedule and the kind of its prediction: the only place that knows any of the three.

    Args:
        net: the network.
        schedule: the noise path it was trained on.
        kind: what it predicts.
        call: how it is called; a model family's row, or ``plain_call``.
        dtype: the network's arithmetic; anything but float32 runs it under autocast. Conversions stay in the dtype
            of ``x_t``.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        kind: Kind,
        call: Call = plain_call,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.net = net
        self.schedule = schedule
        self.kind: Kind = kind
        self.call = call
        self.dtype = dtype

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *, want: Kind = "x0", s: Tensor | None = None) -> Tensor:
        """The prediction of kind ``want``.

        Args:
            x_t: noised samples, (B, ...).
            t: their times, (B,).
            cond: conditions, each (B, ...).
            want: kind of prediction to return.
            s: times that a network of two times heads for, (B,), below ``t``: its clean estimate is then the one whose
                jump from ``t`` lands there. None is ``t`` itself, the estimate of a network of one time.

        Returns:
            (B, ...), the dtype of ``x_t``.

        Raises:
            ValueError: if ``s`` is given and the network knows one time only.
        """
        net = self.net
        if isinstance(net, TwoTime):
            net = Towards(net, t, t if s is None else s, self.schedule.t_max)
        elif s is not None:
            raise ValueError(f"s: this {type(network_of(net)).__name__} knows one time only; wrap it in TwoTime")
        with torch.autocast(x_t.device.type, self.dtype, enabled=self.dtype != torch.float32):
            pred = self.call(net, x_t, t, cond)
        if want == self.kind:
            return pred.to(x_t.dtype)
        return convert(pred.to(x_t.dtype), x_t, self.schedule.coeffs(t, x_t), self.kind, want)


def unscaled(cond: Cond) -> Cond:
    """Conditions without the guidance scale that a batch may bring along."""
    return {k: v for k, v in cond.items() if k != "guidance"}


def of_samples(cond: Cond, chosen: Tensor) -> Cond:
    """Conditions of some samples of a batch, by their indices."""
    return {k: v[chosen] for k, v in cond.items()}


def with_null(cond: Cond, null: Cond, dropped: Tensor) -> Cond:
    """Conditions with the null condition in place of those samples where ``dropped`` (B,) is true.

    Raises:
        ValueError: if there is no null condition.
    """
    if not null:
        raise ValueError(
            "conditions cannot be dropped: this teacher has no null condition; set the share that is dropped to 0 "
            "(null_rate, critic_null_rate or drop)"
        )
    scale = {k: v for k, v in cond.items() if k == "guidance"}
    rest = unscaled(cond)
    nulls = null_like(null, rest)
    return scale | {k: torch.where(dropped.view(-1, *[1] * (v.ndim - 1)), nulls[k], v) for k, v in rest.items()}


OF_SIZE = frozenset({"time_ids", "resolution", "aspect_ratio"})
"""Conditions that tell the size of a sample and not what it shows: the null condition has the sample's own."""


def null_like(null: Cond, cond: Cond) -> Cond:
    """The null condition, each tensor (1, ...), expanded to the batch of ``cond`` and of its samples' sizes."""
    return {k: v if k in OF_SIZE else null[k].to(v).expand_as(v) for k, v in cond.items()}


def both_predictions(
    predict: Predictor, null: Cond, x_t: Tensor, t: Tensor, cond: Cond, *, want: Kind = "x0"
) -> tuple[Tensor, Tensor]:
    """The conditional and the unconditional prediction, in one evaluation of both halves.

    Args:
        predict: the network, unguided.
        null: the unconditional condition, each tensor (1, ...), expanded to the batch.
        x_t: noised samples, (B, ...).
        t: their times, (B,).
        cond: conditions, each (B, ...).
        want: kind of prediction to return.

    Returns:
        Two of (B, ...).
    """
    nulls = null_like(null, cond)
    both = {k: torch.cat([v, nulls[k]]) for k, v in cond.items()}
    conditional, unconditional = predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both, want=want).chunk(2)
    return conditional, unconditional


def guided_prediction(
    predict: Predictor, null: Cond, scale: Tensor, x_t: Tensor, t: Tensor, cond: Cond, *, want: Kind = "x0"
) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598) at ``scale`` (B,): ``null + scale (cond - null)``, (B, ...).

    Arguments as in ``both_predictions``; any kind will do, since guidance commutes with conversion.
    """
    conditional, unconditional = both_predictions(predict, null, x_t, t, cond, want=want)
    return unconditional + scale.to(x_t).view(-1, *[1] * (x_t.ndim - 1)) * (conditional - unconditional)


class Guided(nn.Module):
    """A frozen denoiser under classifier-free guidance (arXiv:2207.12598): ``null + scale (cond - null)``.

    ``scale`` counts as pipelines' ``guidance_scale`` does: 1 is the plain conditional model and costs one evaluation,
    anything else costs two, in one batch. It returns in any kind, since guidance commutes with conversion. A batch
    may bring a scale of its own for each sample, ``cond["guidance"]`` (B,); and a network that is itself told the
    scale (FLUX.1 dev, LCM) is told, and evaluated once.

    Args:
        denoiser: the teacher's denoiser; its parameters are frozen here and it is put in eval mode.
        scale: guidance scale.
        null: the unconditional condition, each tensor (1, ...), expanded to the batch; not needed at scale 1.
        interval: times, as fractions of ``t_max``, between which guidance acts; outside, the conditional model.
        told: the network takes ``cond["guidance"]`` as an input; there is no null condition then.

    Raises:
        ValueError: if ``scale`` is not 1 and there is no null condition.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scale: float = 1.0,
        null: Cond | None = None,
        *,
        interval: tuple[float, float] = (0.0, 1.0),
        told: bool = False,
    ):
        super().__init__()
        if scale != 1.0 and not null and not told:
            raise ValueError(f"guidance {scale} needs a null condition, and this teacher has none; use guidance 1")
        self.denoiser = denoiser.requires_grad_(False).eval()
        self.scale = scale
        self.null = null or {}
        self.interval = interval
        self.told = told

    @property
    def schedule(self) -> Schedule:
        """The denoiser's schedule."""
        return self.denoiser.schedule

    def train(self, mode: bool = True) -> Guided:
        """Stays in eval mode whatever the networks around it do."""
        return super().train(False)

    def scales(self, t: Tensor, cond: Cond) -> Tensor:
        """The scale that acts at each of ``t`` (B,): the batch's or this teacher's, and 1 outside the interval."""
        low, high = (f * self.schedule.t_max for f in self.interval)
        scale = cond["guidance"].to(t) if "guidance" in cond else torch.full_like(t, self.scale)
        return torch.where((t >= low) & (t <= high), scale, 1.0)

    def guide(self, predict: Predictor, x_t: Tensor, t: Tensor, cond: Cond, *, want: Kind = "x0") -> Tensor:
        """Another predictor under this guidance: a critic that is to be guided as the teacher is."""
        if self.scale == 1.0 and "guidance" not in cond and not self.told:
            return predict(x_t, t, cond, want=want)
        scale = self.scales(t, cond)
        if self.told:
            return predict(x_t, t, {**cond, "guidance": scale.to(x_t)}, want=want)
        cond = unscaled(cond)
        if not cond or not self.null:
            raise ValueError("guidance needs conditions and a null one: the network would be compared with itself")
        return guided_prediction(predict, self.null, scale, x_t, t, cond, want=want)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *, want: Kind = "x0") -> Tensor:
        """The guided prediction; shapes as ``Denoiser.forward``. Gradients flow to ``x_t``, never to parameters."""
        return self.guide(self.denoiser, x_t, t, cond, want=want)


class Rescheduled(nn.Module):
    """Any predictor seen under another schedule, by matching log-SNR (equal SNR is the same state up to scale).

    Args:
        predictor: what is asked.
        schedule: the schedule it is to appear under.
    """

    def __init__(self, predictor: Predictor, schedule: Schedule):
        super().__init__()
        self.predictor = predictor
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *, want: Kind = "x0", s: Tensor | None = None) -> Tensor:
        """The prediction under the outer schedule; arguments as ``Denoiser.forward``'s, times of the outer one."""
        inner = self.predictor.schedule
        t_in = inner.t_from_logsnr(self.schedule.logsnr(t)).clamp(max=inner.t_max)  # not beyond it by rounding
        outer_c, inner_c = self.schedule.coeffs(t, x_t), inner.coeffs(t_in, x_t)
        # Both (alpha, sigma) pairs point the same way; the ratio of their lengths is finite at either end.
        scale = torch.hypot(inner_c.alpha, inner_c.sigma) / torch.hypot(outer_c.alpha, outer_c.sigma)
        native: Kind = "eps" if want == "eps" else "x0"
        heading = {} if s is None else {"s": s.sign() * inner.t_from_logsnr(self.schedule.logsnr(s.abs()))}
        # x0 and eps do not depend on the schedule
        pred = self.predictor(scale * x_t, t_in, cond, want=native, **heading)
        return convert(pred, x_t, outer_c, native, want)
