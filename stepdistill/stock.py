"""Stock diffusers schedulers that go a student's way: their config alone yields the trained timesteps."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    TCDScheduler,
)
from torch import Tensor

from stepdistill.models.families.base import Opened
from stepdistill.models.families.edm import is_edm
from stepdistill.sampling import Ddim, NoiseCorrected, Renoise, StepRule, Tcd, trailing
from stepdistill.schedule import DiscreteVP, KarrasEDM, RectifiedFlow, Schedule
from stepdistill.student import Student

PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # those that all three VP schedulers can rebuild
_TCD_ETA = 0.3
"""Of TCDScheduler.step, for pipelines that pass none."""


def stock_scheduler(student: Student, opened: Opened, guidance: float | None = None) -> SchedulerMixin:
    """The stock scheduler that samples in ``opened``'s pipeline as the student samples here.

    Its config remembers, under ``_`` keys, which loaders leave alone: the trained steps (``_trained_steps``), and what
    a stock call must be given besides (``_student``, see ``call_record``).

    Args:
        student: its sampler, schedule and kind.
        opened: the teacher.
        guidance: the scale that calls pass; None is the family's.

    Raises:
        ValueError: if there is none; names the cure.
    """
    mine, theirs = (type(s).__name__ for s in (student.schedule, opened.denoiser.schedule))
    if mine != theirs:
        raise ValueError(f"the student's schedule is {mine}; its teacher's pipeline samples on {theirs}")
    if isinstance(student.sampler.rule, NoiseCorrected):
        raise ValueError(
            f"rule {student.sampler.rule}: no stock scheduler takes the first state itself for the noise; train and "
            "export with Ddim(), the same in one step or without signal at t_max, and correct where you sample yourself"
        )
    if isinstance(student.schedule, DiscreteVP):
        scheduler = _vp(student, opened)
    elif isinstance(student.schedule, RectifiedFlow):
        scheduler = _flow(student, opened)
    elif isinstance(student.schedule, KarrasEDM) and is_edm(opened.pipeline.scheduler):
        scheduler = _edm(student, opened)
    else:
        name = type(student.schedule).__name__
        raise ValueError(
            f"the student's schedule is {name}; export knows DiscreteVP, RectifiedFlow, and EDM's pipelines' KarrasEDM"
        )
    if not has_own_pipeline(opened):
        # these pipelines have no place for it; "_" keys pass unnoticed
        record = call_record(student, opened, guidance)
        scheduler.register_to_config(_trained_steps=[student.sampler.steps], _student=record)
    return scheduler


def call_record(student: Student, opened: Opened, guidance: float | None = None) -> dict[str, Any]:
    """What a stock call of an exported student needs that neither its pipeline's class nor its weights say.

    Returns:
        ``call``: its arguments; ``takes``: the name of the conditions among them; ``times``: the trained grid;
        ``shape``: of one sample; ``gamma``: of TCD's rule; ``seeded``: whether the noise between steps is drawn from
        the generator that is passed, and not from torch's own.

    Raises:
        ValueError: if the pipeline has no place for one of them.
    """
    pipeline, family, rule = opened.pipeline, opened.family, student.sampler.rule
    known = call_parameters(pipeline)
    call = {"num_inference_steps": student.sampler.steps} | family.sampling(pipeline)
    call |= dict(zip(("width", "height", "num_frames"), reversed(opened.size or ()), strict=False))
    if guidance is not None:
        if "guidance_scale" not in known:
            raise ValueError(f"guidance {guidance}: {type(pipeline).__name__} takes none; leave it out")
        call["guidance_scale"] = guidance
    if isinstance(rule, Tcd) and student.sampler.steps > 1 and not isinstance(student.schedule, RectifiedFlow):
        if "eta" in known:
            call["eta"] = rule.gamma
        elif rule.gamma != _TCD_ETA:
            raise ValueError(
                f"rule {rule}: {type(pipeline).__name__} passes no eta, so its scheduler takes {_TCD_ETA}; use "
                f"Tcd({_TCD_ETA})"
            )
    conditions = {} if family.encode is not None else family.examples(pipeline, 1)
    draws = student.sampler.steps > 1 and (isinstance(rule, Renoise) or (isinstance(rule, Tcd) and rule.gamma > 0))
    return {
        "call": call,
        "takes": "prompt" if family.encode is not None else "class_labels" if conditions else "batch_size",
        "times": list(student.sampler.times),
        "shape": list(opened.sample_shape),
        "gamma": rule.gamma if isinstance(rule, Tcd) else None,
        "seeded": not draws or passes_generator(pipeline),
    }


def call_parameters(pipeline: DiffusionPipeline) -> set[str]:
    """Names of the arguments of a pipeline's call."""
    return set(inspect.signature(pipeline).parameters) if callable(pipeline) else set()


def passes_generator(pipeline: DiffusionPipeline) -> bool:
    """Whether the noise that is drawn between steps comes from the ``generator`` of the pipeline's call."""
    if isinstance(pipeline, ConsistencyModelPipeline | DDIMPipeline):
        return True
    if not callable(pipeline):
        return False
    return "prepare_extra_step_kwargs" in inspect.unwrap(type(pipeline).__call__).__code__.co_names


def has_own_pipeline(opened: Opened) -> bool:
    """Whether the export carries pipelines/class_conditional.py, for want of a stock class."""
    return opened.family.name == "unet2d" and opened.denoiser.net.config.num_class_embeds is not None


def _vp(student: Student, opened: Opened) -> SchedulerMixin:
    sampler, table = student.sampler, student.schedule
    if student.kind not in PREDICTION_TYPES:
        raise ValueError(f"the student predicts {student.kind}; VP schedulers know {', '.join(PREDICTION_TYPES)}")
    k, n, rule = sampler.steps, table.n, sampler.rule
    even = all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(sampler.times, trailing(k), strict=True))
    if not even or n % k:
        divisors = ", ".join(str(d) for d in range(1, 11) if n % d == 0)
        raise ValueError(
            f"times {[round(t, 4) for t in sampler.times]}: stock schedulers go in even steps from pure noise, as many "
            f"as divide their {n} timesteps; train on trailing(K) with K such as {divisors}"
        )
    plain = opened.family.name == "unet2d" and not has_own_pipeline(opened)  # a DDIMPipeline
    if plain and k == 1 and isinstance(rule, Renoise | Tcd):
        rule = Ddim()  # in one step all three are the clean estimate, and DDIM has a stock pipeline
    # TCDScheduler ends at entry 0 of its table, and our own pipeline alone goes on to the data from there
    lifted = isinstance(rule, Tcd) and not has_own_pipeline(opened)
    config = _vp_config(student, opened.pipeline.scheduler, lifted)
    if isinstance(rule, Ddim):
        scheduler = DDIMScheduler(**config, timestep_spacing="trailing")
    elif isinstance(rule, Renoise | Tcd) and plain:
        raise ValueError(f"rule {rule}: no stock pipeline samples without classes so; use Ddim(), or one step")
    elif isinstance(rule, Renoise) and k < n:
        # the scaling makes LCM's c_skip = 0.25 / (0.25 + (scaling t)^2) vanish; its default of 10 leaves 7e-6 at t = 19
        scheduler = LCMScheduler(**config, original_inference_steps=k, timestep_scaling=1e4)
    elif isinstance(rule, Tcd):
        if k > 1 and rule.gamma > 0 and rule.table != n:
            raise ValueError(f"rule {rule}: TCDScheduler rounds to its {n} timesteps; train with table={n}")
        scheduler = TCDScheduler(**config, original_inference_steps=k)
        if lifted:
            scheduler.register_to_config(_first_alpha=float(opened.pipeline.scheduler.alphas_cumprod[0]))
    else:
        raise ValueError(f"rule {rule} in {k} steps: no stock scheduler does that; use Ddim(), Renoise() or Tcd()")
    if not same_table(DiscreteVP(vp_table(scheduler)), table):
        name = type(opened.pipeline.scheduler).__name__
        raise ValueError(f"{name}: its noise table cannot be rebuilt from its config; use DDIMScheduler")
    return scheduler


def vp_table(scheduler: SchedulerMixin) -> Tensor:
    """``alphas_cumprod`` of an exported student's scheduler as it was trained with (N,).

    That of TCD starts at the data, so that its last step, which goes to the first entry, ends there.
    """
    table, first = scheduler.alphas_cumprod.clone(), scheduler.config.get("_first_alpha")
    if first is not None:
        table[0] = first
    return table


def _vp_config(student: Student, teacher: SchedulerMixin, lifted: bool) -> dict[str, Any]:
    """The table's part of a config; ``lifted`` puts its first entry at the data."""
    config: dict[str, Any] = {
        "num_train_timesteps": student.schedule.n,
        "prediction_type": PREDICTION_TYPES[student.kind],
        "set_alpha_to_one": True,
        "clip_sample": False,
        "steps_offset": 1,  # of no effect on these grids; Stable Diffusion's pipeline warns of any other
    }
    own, table = teacher.config, teacher.alphas_cumprod.double().cpu()
    bent = not torch.allclose((1 - teacher.betas.double().cpu()).cumprod(0), table, rtol=1e-3, atol=0)  # CogVideoX's
    if lifted:
        table = torch.cat([torch.ones(1, dtype=table.dtype), table[1:]])
    if lifted or bent or own.beta_schedule not in _BETA_SCHEDULES:
        ratios = table / torch.cat([torch.ones(1, dtype=table.dtype), table[:-1]])
        betas = 1 - ratios if lifted or bent else teacher.betas
        return config | {"beta_schedule": "linear", "trained_betas": betas.tolist()}
    return config | {
        "beta_start": own.beta_start,
        "beta_end": own.beta_end,
        "beta_schedule": own.beta_schedule,
        "trained_betas": own.trained_betas,
        "rescale_betas_zero_snr": own.get("rescale_betas_zero_snr", False),  # older schedulers lack the key
    }


def _flow(student: Student, opened: Opened) -> SchedulerMixin:
    sampler = student.sampler
    times, k, rule = sampler.times, sampler.steps, sampler.rule
    jumps = isinstance(rule, Ddim) or (isinstance(rule, Tcd) and rule.gamma == 0)
    if not jumps and not isinstance(rule, Renoise):
        raise ValueError(f"rule {rule}: no stock flow scheduler does that; use Ddim() (Euler's step) or Renoise()")
    # u = 1, 1 - 1/K, ... by pipelines that pass sigmas; the others go evenly down to the bottom of the table, which
    # shift_terminal lifts to the trained last time
    passes = opened.family.passes_sigmas
    shift = 1.0
    if passes and k > 1:
        u = 1 - 1 / k
        shift = times[1] * (1 - u) / (u * (1 - times[1]))
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=opened.pipeline.scheduler.config.num_train_timesteps,
        shift=round(shift, 9),
        shift_terminal=None if passes or k == 1 else times[-1],
        stochastic_sampling=isinstance(rule, Renoise),
    )
    found = flow_times(scheduler, k, passes)
    if not np.allclose(found, times, rtol=0, atol=1e-5):
        raise ValueError(
            f"times {[round(t, 4) for t in times]}: {type(opened.pipeline).__name__} would sample at "
            f"{[round(t, 4) for t in found]}; train on trailing({k})"
        )
    return scheduler


def stock_times(scheduler: SchedulerMixin, schedule: Schedule, steps: int, passes_sigmas: bool) -> list[float]:
    """The times, as fractions of ``t_max``, at which a pipeline with an exported scheduler calls its network."""
    if isinstance(schedule, RectifiedFlow):
        return flow_times(scheduler, steps, passes_sigmas)
    scheduler.set_timesteps(steps)
    if isinstance(schedule, KarrasEDM):
        return schedule.t_from_logsnr(-2 * scheduler.sigmas[:-1].double().log()).tolist()
    return ((scheduler.timesteps + 1) / scheduler.config.num_train_timesteps).tolist()


def flow_times(scheduler: FlowMatchEulerDiscreteScheduler, steps: int, passes_sigmas: bool) -> list[float]:
    """The times at which a pipeline with this scheduler calls its network."""
    if passes_sigmas:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    else:
        scheduler.set_timesteps(steps)
    return (scheduler.timesteps / scheduler.config.num_train_timesteps).tolist()


def _edm(student: Student, opened: Opened) -> SchedulerMixin:
    own, sampler = opened.pipeline.scheduler, student.sampler
    consistency = isinstance(own, CMStochasticIterativeScheduler)
    rule: type[StepRule] = Renoise if consistency else Ddim
    if not isinstance(sampler.rule, rule) and (sampler.steps > 1 or not isinstance(sampler.rule, Ddim | Renoise | Tcd)):
        raise ValueError(f"rule {sampler.rule}: no stock EDM scheduler does that here; use {rule.__name__}()")
    sigmas = student.schedule(torch.tensor(sampler.times, dtype=torch.float64)).sigma.tolist()
    return _consistency(sigmas, own) if consistency else _euler(sigmas, opened)


def _euler(sigmas: list[float], opened: Opened) -> EDMEulerScheduler:
    if isinstance(opened.pipeline, DDPMPipeline):
        raise ValueError("DDPMPipeline does not scale what its network is given, so it samples no EDM student rightly")
    # it goes evenly in sigma^(1 / rho) down to its sigma_min; the network is told sigma alone, so both are free to fit
    k, own = len(sigmas), opened.pipeline.scheduler.config
    scheduler = EDMEulerScheduler.from_config(
        own,
        sigma_min=sigmas[-1] if k > 1 else own.sigma_min,
        sigma_schedule="karras",
        rho=_rho(sigmas[0], sigmas[-1], 1 / (k - 1), sigmas[1]) if k > 2 else own.rho,
        final_sigmas_type="zero",
    )
    _check_sigmas(scheduler, sigmas)
    return scheduler


def _consistency(sigmas: list[float], own: SchedulerMixin) -> CMStochasticIterativeScheduler:
    k, config = len(sigmas), own.config
    nearest = 22 * config.sigma_min  # within 0.1 %: it re-noises to sqrt(sigma^2 - sigma_min^2)
    if k > 1 and sigmas[-1] < nearest:
        raise ValueError(
            f"sigma {sigmas[-1]:.4g} of the last step: CMStochasticIterativeScheduler re-noises to less than sigma so "
            f"close to its sigma_min = {config.sigma_min:g}; end at or above {nearest:g}"
        )
    scheduler = CMStochasticIterativeScheduler.from_config(config, clip_denoised=False)
    try:
        _check_sigmas(scheduler, sigmas)
    except ValueError:
        # not the teacher's own grid; with K + 1 entries its K steps are 1 / K of the way to sigma_min each
        rho = _rho(config.sigma_max, config.sigma_min, 1 / k, sigmas[min(1, k - 1)])
        scheduler = CMStochasticIterativeScheduler.from_config(
            config, clip_denoised=False, num_train_timesteps=k + 1, rho=rho
        )
        _check_sigmas(scheduler, sigmas)
    return scheduler


def _check_sigmas(scheduler: SchedulerMixin, sigmas: list[float]) -> None:
    try:
        scheduler.set_timesteps(len(sigmas))
        found = scheduler.sigmas[:-1].tolist()
    except ValueError:  # more steps than it has entries
        found = []
    if len(found) != len(sigmas) or not np.allclose(found, sigmas, rtol=1e-4, atol=0):
        raise ValueError(
            f"sigmas {[round(s, 4) for s in sigmas]}: {type(scheduler).__name__} would sample at "
            f"{[round(s, 4) for s in found]}; train on trailing({len(sigmas)}), or at sigmas that are even in "
            "sigma^(1 / rho) for some rho"
        )


def _rho(first: float, last: float, way: float, sigma: float) -> float:
    """The rho with which ``way`` of the way from ``first`` to ``last``, in sigma^(1 / rho), is at ``sigma``."""
    low, high = 1e-6, 10.0  # of 1 / rho, the exponent of a power mean, which grows with it
    for _ in range(100):
        power = (low + high) / 2
        mean = ((1 - way) * first**power + way * last**power) ** (1 / power)
        low, high = (power, high) if mean < sigma else (low, power)
    return 1 / high


def same_table(a: Schedule, b: Schedule) -> bool:
    """Whether two VP tables are one, to rounding."""
    if not (isinstance(a, DiscreteVP) and isinstance(b, DiscreteVP)) or a.n != b.n:
        return False
    t = torch.arange(a.n + 1, dtype=torch.float64) / a.n
    return torch.allclose(a(t).alpha, b(t).alpha, rtol=0, atol=1e-6)


def even_timesteps(steps: int, n: int) -> list[int]:
    """Trailing timesteps of an ``n``-entry table."""
    return [n * (steps - i) // steps - 1 for i in range(steps)]
