"""The training loop that all stages share: warm-up, constant rate, linear decay; moving average; resumes exactly."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stepdistill.checkpoint import write_atomically

RUNS = Path(__file__).resolve().parents[2] / "runs" / "shapes"


@dataclass(frozen=True)
class Plan:
    """How long and how fast one network is trained."""

    name: str
    steps: int
    lr: float
    ema: float = 0.999
    decay: float = 0.3
    """Last share of the steps, in which the rate falls to zero: a run may be given fewer steps until it begins."""
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    log_every: int = 100
    save_every: int = 500


@dataclass(frozen=True)
class Trained:
    """What became of a plan."""

    average: nn.Module
    """Moving average of the network, in eval mode and without gradients."""
    seconds: float
    """CPU seconds of all the runs that it took."""


def rate(plan: Plan, step: int) -> float:
    """The learning rate of a step."""
    return plan.lr * min(1, (step + 1) / plan.warmup, (plan.steps - step) / max(1, plan.decay * plan.steps))


def train(
    plan: Plan,
    make: Callable[[], nn.Module],
    loss: Callable[[nn.Module, int, torch.Generator], dict[str, Tensor]],
    watch: Callable[[nn.Module], str] = lambda average: "",
    watch_every: int = 0,
) -> Trained:
    """Minimise ``loss``'s first value; go on from ``runs/shapes/<name>.pt`` if it is there.

    Args:
        plan: see ``Plan``.
        make: a new network; called after seeding.
        loss: named scalars from the network, the step, and a generator seeded with it.
        watch: a line to print about the moving average.
        watch_every: steps between such lines; 0 for none.
    """
    torch.manual_seed(0)
    model, average = make(), make().eval().requires_grad_(False)
    average.load_state_dict(model.state_dict())
    weights = [p for p in model.parameters() if p.requires_grad]
    optim = torch.optim.AdamW(weights, plan.lr, betas=(0.9, 0.99), weight_decay=plan.weight_decay, fused=True)
    path = RUNS / f"{plan.name}.pt"
    first, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optim.load_state_dict(state["optim"])
        first, spent = state["step"], state["seconds"]
        print(f"{plan.name}: {'done before' if first >= plan.steps else f'goes on at step {first}'}", flush=True)
    pairs = [(a, m) for a, m in zip(average.parameters(), model.parameters(), strict=True) if m.requires_grad]
    averages, moving = map(list, zip(*pairs, strict=True))
    began, logged, sums = time.process_time(), time.perf_counter(), {}

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "average": average.state_dict(), "optim": optim.state_dict()}
        state |= {"step": step, "seconds": spent + time.process_time() - began}
        write_atomically(path, lambda p: torch.save(state, p))

    model.train()
    for step in range(first, plan.steps):
        terms = loss(model, step, torch.Generator().manual_seed(step))
        total = next(iter(terms.values()))
        if not bool(total.isfinite()):
            raise FloatingPointError(f"{plan.name}: loss {float(total)} at step {step}")
        optim.param_groups[0]["lr"] = rate(plan, step)
        optim.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(weights, plan.clip)
        optim.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, moving, 1 - min(plan.ema, (1 + step) / (10 + step)))
        sums = {name: sums.get(name, 0.0) + float(value.detach()) for name, value in terms.items()}
        done = step + 1
        if done % plan.log_every == 0:
            now = time.perf_counter()
            means = " ".join(f"{name} {value / plan.log_every:.4f}" for name, value in sums.items())
            pace = (now - logged) / plan.log_every
            left = pace * (plan.steps - done) / 60
            print(f"{plan.name} {done}/{plan.steps} {means} {1000 * pace:.0f} ms/step, {left:.1f} min left", flush=True)
            logged, sums = now, {}
        if done % plan.save_every == 0 or done == plan.steps:
            save(done)
        if watch_every and done % watch_every == 0:
            print(f"{plan.name} {done}: {watch(average)}", flush=True)
            logged = time.perf_counter()
    return Trained(average, spent + time.process_time() - began)
