"""Real samples to noise in a few calls, and back under another condition: editing with an iCD student.

Samples are what the denoiser sees: ``opened.to_latents(images)`` before, ``opened.decode(...)`` after. ::

    student = load_student("run/pipeline")
    inverter = load_inverter("run/pipeline", student)
    noise = invert(inverter, x0, source)
    edited = edit(student, inverter, x0, source, target)
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from stepdistill.functional.ode import jump
from stepdistill.models.denoiser import Call, Cond, Denoiser, Guided, plain_call
from stepdistill.sampling import Ddim, Sampler, Tcd, at
from stepdistill.schedule import Kind, Schedule
from stepdistill.student import Student


class Inverter(Denoiser):
    """A denoiser that jumps upwards from edge to edge: the forward model of iCD (arXiv:2406.14539).

    At t = 0 a jump has no direction, so data are taken for the state at ``start``, without noise. That is right to
    first order in the variance there.

    Args:
        edges: where its jumps end, as fractions of the schedule's ``t_max``: rising to 1.
        start: where the first of them begins, as a fraction; below the first edge.
        net: see ``Denoiser``, as all the others.

    Raises:
        ValueError: if the edges do not rise from above ``start`` to 1.
    """

    def __init__(
        self,
        edges: tuple[float, ...],
        start: float,
        net: nn.Module,
        schedule: Schedule,
        kind: Kind,
        call: Call = plain_call,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(net, schedule, kind, call, dtype)
        grid = (start, *edges)
        if not edges or start <= 0 or edges[-1] != 1 or any(a >= b for a, b in zip(grid, edges, strict=False)):
            raise ValueError(f"an inverter's edges must rise from above its start > 0 to 1; got {start} and {edges}")
        self.edges, self.start = edges, start

    @classmethod
    def beside(cls, student: Student, start: float) -> Inverter:
        """An inverter over a student's grid, with a copy of its network."""
        edges = tuple(reversed(student.sampler.times))
        net = copy.deepcopy(student.net)
        return cls(edges, start, net, student.schedule, student.kind, student.call, student.dtype)

    def rise(self, x: Tensor, low: Tensor, high: Tensor, cond: Cond) -> Tensor:
        """One jump.

        Args:
            x: states at ``low``, (B, ...).
            low: times, (B,); at 0 the states are data.
            high: times to go to, (B,).
            cond: conditions, each (B, ...).

        Returns:
            States at ``high``, (B, ...).
        """
        t = torch.where(low == 0, self.start * self.schedule.t_max, low)
        c = self.schedule.coeffs(t, x)
        x = torch.where((low == 0).view_as(c.alpha), c.alpha * x, x)
        return jump(x, self(x, t, cond), c, self.schedule.coeffs(high, x))


@torch.no_grad()
def invert(inverter: Inverter, x0: Tensor, cond: Cond) -> Tensor:
    """The noise that samples come from, in one call per edge.

    Args:
        inverter: the forward model.
        x0: real samples or latents, (B, ...).
        cond: what they show, each (B, ...). A network that is told the guidance scale wants ``guidance``, ones.

    Returns:
        (B, ...), what ``Sampler.run`` starts from: standard normal if ``x0`` are data.
    """
    t_max, x, low = inverter.schedule.t_max, x0, 0.0
    for high in inverter.edges:
        x, low = inverter.rise(x, at(low * t_max, x), at(high * t_max, x), cond), high
    return x / inverter.schedule.prior_std


@torch.no_grad()
def edit(decoder: Student | Guided, inverter: Inverter, x0: Tensor, source: Cond, target: Cond) -> Tensor:
    """Keep the noise of ``x0`` and show something else: invert under one condition, decode under another.

    With a guided decoder, ``Guided(student, 8.0, null, interval=(0.0, 0.8))``, guidance acts below t = 0.8 and leaves
    what is decided above, the layout, as it was (dynamic guidance). Inversion is never guided. A student that is told
    the scale as an input takes ``Guided(student, 8.0, told=True, interval=(0.0, 0.8))``.

    Args:
        decoder: the student, bare or under guidance.
        inverter: trained beside it.
        x0: real samples or latents, (B, ...).
        source: what they show, each (B, ...).
        target: what the result shall show.

    Returns:
        (B, ...).

    Raises:
        ValueError: if the two networks have different grids, or the student's sampler adds noise between its steps.
    """
    student = decoder.denoiser if isinstance(decoder, Guided) else decoder
    if tuple(reversed(student.sampler.times)) != inverter.edges:
        raise ValueError(
            f"the student jumps from {list(student.sampler.times)} and the inverter to {list(inverter.edges)}; "
            "take two that were trained together"
        )
    refuse_fresh_noise(student.sampler)
    if isinstance(decoder, Guided) and decoder.told:
        source = {**source, "guidance": x0.new_ones(len(x0))}
    return student.sampler.run(decoder, invert(inverter, x0, source), target, torch.Generator())


def refuse_fresh_noise(sampler: Sampler) -> None:
    """Noise drawn between steps would not be what a sample was inverted to.

    Raises:
        ValueError: if the rule draws any.
    """
    if not (isinstance(sampler.rule, Ddim) or (isinstance(sampler.rule, Tcd) and sampler.rule.gamma == 0)):
        raise ValueError(f"sampler.rule {sampler.rule} does not invert: it must jump without fresh noise; use Ddim()")
