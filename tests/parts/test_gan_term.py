"""The adversarial term: what each player sees, what reaches whom, and the gradient penalty."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.functional.gan import disc_loss, student_loss
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.taps import Tap
from stepdistill.objective import Step
from stepdistill.parts.gan import Gan
from stepdistill.parts.times import OnGrid, Uniform
from stepdistill.schedule import RectifiedFlow, TrigFlow

SCHEDULE = RectifiedFlow()
SHAPE = (6, 1, 4, 4)


class Linear(nn.Module):
    """A discriminator with logits w . x_t + label, that keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.seen.append((x_t, t))
        return (x_t.flatten(1) @ self.weight + cond["labels"])[:, None]


def cond(n: int = 6) -> dict[str, Tensor]:
    return {"labels": torch.arange(n).float()}


@pytest.mark.parametrize("loss", ["softplus", "hinge"])
def test_the_students_term_is_its_loss_on_its_own_noised_samples(loss: str) -> None:
    gan, disc = Gan(loss=loss, times=Uniform(0.1, 0.6)), Linear()
    x0 = torch.randn(SHAPE, requires_grad=True)
    term = gan.student_term(disc, SCHEDULE, x0, cond(), Step.at(2))
    twin = Step.at(2)
    t = Uniform(0.1, 0.6)(SCHEDULE, 6, twin)
    x_t = SCHEDULE.add_noise(x0, twin.randn(SHAPE), t)
    by_hand = student_loss((x_t.flatten(1) @ disc.weight + cond()["labels"])[:, None], loss)
    assert_close(term, by_hand)
    grads = [torch.autograd.grad(v, x0, retain_graph=True)[0] for v in (term, by_hand)]
    assert_close(grads[0], grads[1])
    assert float(grads[0].abs().sum()) > 0


@pytest.mark.parametrize("loss", ["softplus", "hinge"])
def test_the_discriminator_sees_real_and_fake_at_the_same_times_in_one_call(loss: str) -> None:
    gan, disc = Gan(loss=loss, times=Uniform(0.1, 0.6)), Linear()
    real, fake = torch.randn(SHAPE), torch.randn(SHAPE, requires_grad=True)
    value, accuracy = gan.disc_term(disc, SCHEDULE, real, fake, cond(), Step.at(2))
    ((x_t, t),) = disc.seen
    assert len(x_t) == 12
    assert_close(t[:6], t[6:], rtol=0, atol=0)
    c = SCHEDULE.coeffs(t, x_t)
    eps = (x_t - c.alpha * torch.cat([real, fake.detach()])) / c.sigma
    assert abs(float(eps.detach().std()) - 1) < 0.2
    assert not torch.allclose(eps[:6], eps[6:])  # each sample has noise of its own
    logits = (x_t.flatten(1) @ disc.weight + cond()["labels"].repeat(2))[:, None]
    assert_close(value, disc_loss(logits[:6], logits[6:], loss))
    share = 0.5 * ((logits[:6] > 0).float().mean() + (logits[6:] < 0).float().mean())
    assert_close(accuracy, share)
    value.backward()
    assert fake.grad is None  # the discriminator's turn does not teach the student
    assert disc.weight.grad is not None


def test_the_relativistic_term_compares_with_real_samples_noised_to_the_same_times() -> None:
    gan, disc = Gan(loss="relativistic", times=Uniform(0.1, 0.6)), Linear()
    x0, real = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    term = gan.student_term(disc, SCHEDULE, x0, cond(), Step.at(2), real=real)
    twin = Step.at(2)
    t = Uniform(0.1, 0.6)(SCHEDULE, 6, twin)
    x_t, real_t = (SCHEDULE.add_noise(x, twin.randn(SHAPE), t) for x in (x0, real))
    by_hand = torch.nn.functional.softplus((real_t - x_t).flatten(1) @ disc.weight).mean()
    assert_close(term, by_hand)
    grads = [torch.autograd.grad(v, x0, retain_graph=True)[0] for v in (term, by_hand)]
    assert_close(grads[0], grads[1])
    assert not disc.seen[-1][0].requires_grad  # nothing is kept of the real branch
    value, accuracy = gan.disc_term(disc, SCHEDULE, real, x0, cond(), Step.at(3))
    ((x_t, _),) = disc.seen[-1:]
    lead = (x_t[:6] - x_t[6:]).flatten(1) @ disc.weight
    assert_close(value, torch.nn.functional.softplus(-lead).mean())
    assert_close(accuracy, (lead > 0).float().mean())
    with pytest.raises(ValueError, match=r"gan.loss 'relativistic' needs real samples in the student's turn"):
        gan.student_term(disc, SCHEDULE, x0, cond(), Step.at(2))


def test_other_losses_leave_real_samples_unseen() -> None:
    disc, x0 = Linear(), torch.randn(SHAPE)
    plain = Gan().student_term(disc, SCHEDULE, x0, cond(), Step.at(2))
    assert_close(Gan().student_term(disc, SCHEDULE, x0, cond(), Step.at(2), real=torch.randn(SHAPE)), plain)
    assert len(disc.seen) == 2


def test_identical_players_leave_the_discriminator_at_chance() -> None:
    class Blind(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            return torch.zeros(len(x_t), 3)

    x = torch.randn(SHAPE)
    for loss, chance in (("softplus", 2 * math.log(2)), ("hinge", 2.0)):
        value, _ = Gan(loss=loss).disc_term(Blind(), SCHEDULE, x, x, cond(), Step.at(0))
        assert_close(float(value), chance)


def test_the_penalty_is_the_squared_gradient_of_a_linear_discriminator() -> None:
    """E[(l(x + s n) - l(x))^2] / s^2 = |w|^2 exactly in expectation, whatever s."""
    n = 4000
    real, fake = torch.randn(n, 1, 4, 4), torch.randn(n, 1, 4, 4)
    disc = Linear()
    for noise in (0.01, 0.5):
        plain, _ = Gan(times=OnGrid((0.3,))).disc_term(disc, SCHEDULE, real, fake, cond(n), Step.at(1))
        with_r1, _ = Gan(times=OnGrid((0.3,)), r1=0.7, r1_noise=noise).disc_term(
            disc, SCHEDULE, real, fake, cond(n), Step.at(1)
        )
        norm = disc.weight.detach().square().sum()
        # float32 logits in the thousands keep about three digits of a difference of .01
        assert_close(((with_r1 - plain) / 0.7).detach(), norm, rtol=0.1, atol=0)


def test_the_penalty_looks_at_real_samples_at_their_own_times_and_conditions() -> None:
    disc = Linear()
    gan = Gan(times=Uniform(0.1, 0.9), r1=1.0, r1_noise=0.2)
    gan.disc_term(disc, TrigFlow(), torch.randn(SHAPE), torch.randn(SHAPE), cond(), Step.at(1))
    (both, t), (near, t_near) = disc.seen
    assert_close(t_near, t[:6], rtol=0, atol=0)
    moved = near - both[:6]
    assert 0.1 < float(moved.std()) < 0.3
    assert float((near - both[6:]).std()) > 1


def test_a_real_discriminator_teaches_the_student_and_learns_itself() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mid, self.out = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return self.out(self.mid(x_t))

    teacher = Denoiser(Net(), SCHEDULE, "velocity").requires_grad_(False)
    disc = Discriminator(teacher, (Tap("mid", 4),), width=16)
    gan = Gan(loss="softplus", times=Uniform(0.0, 0.3))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(disc.parameters(), lr=3e-3)
    for index in range(60):  # stripes against noise
        real = torch.randn(16, 1, 1, 8, generator=generator).expand(16, 1, 8, 8)
        fake = torch.randn(16, 1, 8, 8, generator=generator)
        value, accuracy = gan.disc_term(disc, SCHEDULE, real, fake, {}, Step.at(index))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert float(value.detach()) < 0.5
    assert float(accuracy) > 0.9
    fake.requires_grad_()
    gan.student_term(disc, SCHEDULE, fake, {}, Step.at(0)).backward()
    moved = fake.detach() - 50 * fake.grad
    with torch.no_grad():
        before, after = (gan.student_term(disc, SCHEDULE, x, {}, Step.at(0)) for x in (fake.detach(), moved))
    assert float(after) < float(before)
    assert all(p.grad is None for p in teacher.parameters())
