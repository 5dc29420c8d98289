"""DisBack: distribution backtracking, score distillation along the teacher's own degradation. arXiv:2408.15991"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from torch import Tensor, nn, no_grad

from stepdistill.models.denoiser import Cond, Denoiser, Guided, Predictor
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.objectives.score.dmd2 import DMD2
from stepdistill.sampling import Sampler
from stepdistill.schedule import Kind


@register("disback", family="score", paper="2408.15991")
@dataclass(frozen=True)
class DisBack(Objective):
    """Move the student towards the teacher by way of what the teacher passes through on the opposite way (sec. 4).

    First the critic, which starts as the teacher, is fitted to samples of the student, which stands still; its weights
    are recorded on the way (degradation recording). Then DMD2 begins, where the record is the teacher, from
    the last to the first of it, and the true teacher at the end (backtracking): every target is near to where
    the student is, so that its scores are reliable there. Without a record it is DMD2 itself.

    Records are guided as the teacher is, like the authors'. They are fitted under conditions alone, so that under
    guidance their unconditional half lags behind, and the first target is not as near.
    """

    needs = frozenset({"student", "teacher", "critic"})
    optional = frozenset({"disc"})

    base: DMD2 = field(default_factory=DMD2)
    """The score distillation of the second stage."""
    record_steps: int = 1000
    """Critic updates of the first stage; 0 leaves it out."""
    record_every: int = 100
    """Updates between records. The last of the stage is where the critic goes on from, so it is no target."""
    target_steps: int = 1000
    """Steps at each recorded target."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.record_steps < 0 or self.record_every < 1 or self.record_steps % self.record_every:
            raise ValueError(
                f"objective.record_steps must be a multiple of record_every, at least 0; got {self.record_steps} and "
                f"{self.record_every}"
            )
        if self.target_steps < 1:
            raise ValueError(f"objective.target_steps must be at least 1; got {self.target_steps}")

    @property
    def recorded(self) -> int:
        """How many states of the critic are kept."""
        return max(self.record_steps // self.record_every - 1, 0)

    @property
    def data(self) -> frozenset[str]:  # type: ignore[override]
        """Real samples for the base's GAN, if it has one."""
        return self.base.data

    def check(self, sampler: Sampler) -> None:
        """As DMD2."""
        self.base.check(sampler)

    def check_guidance(self, *, guided: bool, varies: bool, told: bool) -> None:
        """Records are guided, not told."""
        if told and self.recorded:
            raise ValueError("student.told_guidance: DisBack guides its records by their null condition; leave it out")

    def extras(self, student: Denoiser) -> dict[str, nn.Module]:
        """Room for the record, in networks as the student's."""
        copies = (copy.deepcopy(student.net) for _ in range(self.recorded))
        room = (Denoiser(net, student.schedule, student.kind, student.call, student.dtype) for net in copies)
        return {"record": nn.ModuleList(room).requires_grad_(False).eval()} if self.recorded else {}

    def turns(self) -> tuple[Turn, ...]:
        """DMD2's with a moving target, all of them after the record is complete."""
        begin = self.record_steps
        student, *others = self.base.turns()
        record = (Turn(self.record_loss, moves=("critic",), stop=begin, name="record"),) if begin else ()
        return (
            Turn(self.student_loss, moves=student.moves, every=student.every, start=begin),
            *(Turn(*turn.losses, moves=turn.moves, every=turn.every, start=begin) for turn in others),
            *record,
        )

    def target(self, index: int) -> int:
        """Which record, counted from 1, is the teacher at step ``index``; 0 for the true teacher."""
        return max(self.recorded - (index - self.record_steps) // self.target_steps, 0)

    def record_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Denoise the samples of a student that does not move; keep the critic now and then, before it is updated."""
        number, rest = divmod(step.index, self.record_every)
        if rest == 0 and number > 0:
            _keep(nets.critic, nets.record[number - 1])
        return self.base.critic_loss(nets, batch, step)

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """DMD2's, towards the target of this step."""
        number = self.target(step.index)
        if number == 0:
            return self.base.student_loss(nets, batch, step)
        target = GuidedAs(nets.record[number - 1], nets.teacher)
        return self.base.student_loss(Nets({**nets, "teacher": target}), batch, step)


class GuidedAs(nn.Module):
    """A record in the teacher's place, under the guidance of the teacher."""

    def __init__(self, record: Denoiser, teacher: nn.Module):
        super().__init__()
        self.record, self.schedule = record, record.schedule
        self.guided = teacher if isinstance(teacher, Guided) else None

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *, want: Kind = "x0") -> Tensor:
        """As ``Guided.forward``."""
        predict: Predictor = self.record
        return self.guided.guide(predict, x_t, t, cond, want=want) if self.guided else predict(x_t, t, cond, want=want)


@no_grad()
def _keep(critic: nn.Module, record: nn.Module) -> None:
    """Copy the critic's weights.

    Raises:
        ValueError: if the two networks are not made alike.
    """
    theirs = critic.state_dict()
    if {k: v.shape for k, v in theirs.items()} != {k: v.shape for k, v in record.state_dict().items()}:
        raise ValueError("DisBack keeps states of the critic in copies of the student: let both have the same form")
    record.load_state_dict(theirs)
