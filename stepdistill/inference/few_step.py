"""A few-step sampler as one function of tensors: static shapes, no draws, no branches on data, no host syncs.

Every rule that students are exported with (DDIM, re-noising, TCD) makes ``x <- a x + b net(x, t) + c z`` of a step,
with coefficients that depend on the two times alone. They are computed once, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stepdistill.functional.ode import jump
from stepdistill.inference.weights import dtype_of
from stepdistill.models.denoiser import Cond
from stepdistill.sampling import Ddim, Renoise, Sampler, Tcd
from stepdistill.schedule import Kind, Schedule, convert
from stepdistill.student import Student


@dataclass(frozen=True)
class Plan:
    """A sampler's steps as numbers."""

    start: float
    """What standard normal noise is multiplied by at first."""
    times: tuple[float, ...]
    """When the network is called, in the schedule's time, (K,)."""
    rows: tuple[tuple[float, float, float], ...]
    """Of each step (a, b, c) in ``x <- a x + b net(x, t) + c z``, (K,); the last c is 0."""

    @property
    def draws(self) -> int:
        """How many steps need fresh noise."""
        return sum(c != 0 for _, _, c in self.rows)


def plan_of(sampler: Sampler, schedule: Schedule, kind: Kind) -> Plan:
    """The steps of a sampler, for a network that predicts ``kind`` on a schedule.

    A step jumps to ``r = rule.lands(s)`` and adds the noise that leads back up to s: with r = s that is DDIM
    (arXiv:2010.02502), with r = 0 re-noising (arXiv:2303.01469 alg. 1), between them TCD (arXiv:2402.19159 eq. 26).

    Raises:
        ValueError: for rules of another form, which are no exported student's.
    """
    rule, t_max = sampler.rule, schedule.t_max
    if type(rule) not in (Ddim, Renoise, Tcd):
        raise ValueError(f"rule {rule}: the few-step loop goes by Ddim(), Renoise() or Tcd()")
    x_t, pred = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    rows, edges = [], [torch.tensor([u * t_max], dtype=torch.float64) for u in (*sampler.times, 0.0)]
    for t, s in pairwise(edges):
        r = rule.lands(s, t_max)
        c_t, c_r, c_s = schedule(t), schedule(r), schedule(s)
        a, b = jump(x_t, convert(pred, x_t, c_t, kind, "x0"), c_t, c_r).tolist()
        ratio = float(c_s.alpha / c_r.alpha)
        spread = float((c_s.sigma**2 - (ratio * c_r.sigma) ** 2).clamp_min(0).sqrt()) if float(r) < float(s) else 0.0
        rows.append((ratio * a, ratio * b, spread))
    return Plan(float(schedule.prior_std), tuple(float(t) for t in edges[:-1]), tuple(rows))


class FewStep:
    """Samples a student along its plan, from noise that was drawn before.

    Args:
        student: network, schedule, kind and sampler; networks in half precision get their input so, and the states
            between steps stay in float32.
        guidance: scale of classifier-free guidance, for students that can be guided at inference: null and prompt go
            through the network in one batch. None and 1 never run a negative branch.
    """

    def __init__(self, student: Student, guidance: float | None = None):
        self.student, self.guidance = student, 1.0 if guidance is None else guidance
        self.plan = plan_of(student.sampler, student.schedule, student.kind)
        self.dtype = torch.float32
        """What the network is given; set by ``table``."""
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, list[tuple[Tensor, ...]]]] = {}

    def conditions(self, cond: Cond, null: Cond | None) -> Cond:
        """What ``run`` takes: of guided students null and prompt, one behind the other, each (2 B, ...)."""
        if self.guidance == 1.0:
            return cond
        if not null:
            raise ValueError(
                f"guidance {self.guidance} needs a null condition, and this student has none; leave it out"
            )
        return {k: torch.cat([null[k].to(v).expand_as(v), v]) for k, v in cond.items()}

    def table(self, batch: int, device: torch.device) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Times (K, B) and coefficients, K times (a, b, c), on a device; made once for each batch size."""
        self.dtype = dtype_of(self.student.net)
        key = batch * (1 if self.guidance == 1.0 else 2), device
        if key not in self._tables:
            times = torch.tensor(self.plan.times, dtype=torch.float64, device=device)
            rows = torch.tensor(self.plan.rows, dtype=torch.float64).float().to(device)
            self._tables[key] = times[:, None].expand(-1, key[0]).contiguous(), [tuple(row) for row in rows]
        return self._tables[key]

    def run(
        self,
        noise: Tensor,
        fresh: Tensor | None,
        cond: Cond,
        times: Tensor,
        rows: Sequence[tuple[Tensor, ...]],
    ) -> Tensor:
        """The whole sampler; fit for ``torch.compile(fullgraph=True)`` and CUDA graphs.

        Args:
            noise: standard normal, (B, ...), float32.
            fresh: noise of the steps, (K - 1, B, ...); None where the plan draws none.
            cond: from ``conditions``.
            times: from ``table``.
            rows: from ``table``.

        Returns:
            Clean samples, (B, ...), float32.
        """
        net = self.student.net
        x = noise * self.plan.start  # a tensor of inference mode, as all later ones: a graph is for one kind
        for i, (a, b, c) in enumerate(rows):
            given = x if self.guidance == 1.0 else torch.cat([x, x])
            pred = self.student.call(net, given.to(self.dtype), times[i], cond).to(x.dtype)
            if self.guidance != 1.0:
                null, with_prompt = pred.chunk(2)
                pred = null + self.guidance * (with_prompt - null)
            x = a * x + b * pred
            if self.plan.rows[i][2]:
                x = x + c * fresh[i]
        return x
