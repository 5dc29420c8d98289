"""Recipes on the bundled digits teacher: minutes on one core of a laptop's CPU.

``stepdistill distill digits_kd@4`` asks for four steps.
"""

from __future__ import annotations

from dataclasses import replace

from stepdistill.data import Data, DigitsData, Labels, TeacherPairs
from stepdistill.functional.distances import L2, ElementHuber, Huber
from stepdistill.objective import Objective
from stepdistill.objectives import (
    CD,
    CT,
    DMD,
    DMD2,
    ECT,
    GDD,
    ICD,
    ICT,
    KD,
    LADD,
    LCM,
    MDT,
    PCM,
    PD,
    SCM,
    SDS,
    SNOOPI,
    TSCD,
    VSD,
    DecoupledDMD,
    DiffusionGAN,
    DisBack,
    FDistill,
    GuidedDistillation,
    ImagineFlash,
    MeanFlow,
    Reflow,
    SiD,
    TwinFlow,
)
from stepdistill.parts.chain import NoiseChain
from stepdistill.parts.discretisation import Doubling, Even, Karras
from stepdistill.parts.gan import Gan
from stepdistill.parts.rollout import BackwardSim, OneStep
from stepdistill.parts.segments import Boundaries, Segments
from stepdistill.parts.tangents import CentralDifference
from stepdistill.parts.times import LogNormal, Uniform
from stepdistill.recipe import Evaluation, Recipe, Teacher, Weights
from stepdistill.sampling import Ddim, DpmPP2M, Heun, Renoise, Sampler, StepRule, Tcd, trailing
from stepdistill.trainer import AdamW, Run

PAIRS = TeacherPairs(count=4000, solver=Sampler(trailing(16), DpmPP2M()))
"""As dear as 300 updates of a regression."""
MANY_PAIRS = TeacherPairs(solver=Sampler(trailing(32), DpmPP2M()))
"""Four times as dear, for the quickstart."""

STUDENT = AdamW(8e-4, decay="linear")
"""For targets that move with the student."""
GENTLE = AdamW(4e-4, decay="linear")
"""For derivatives of the student itself as targets, which grow without end at twice that after some 300 updates."""
REGRESSION = AdamW(2e-3, decay="linear")
"""For targets that stand still."""
GAME = {
    "student": AdamW(1e-4, betas=(0.0, 0.999), decay="linear"),
    "critic": AdamW(5e-4, betas=(0.0, 0.999), decay="linear"),
    "disc": AdamW(1e-3, betas=(0.0, 0.99)),
}
"""Players that chase each other: no momentum, the critic five times as fast as the student."""

ADAPTERS = Weights(form="lora", targets=("conv1", "conv2", "conv_shortcut", "time_emb_proj"))
"""LoRA on the bundled network, which has no attention."""


def _on_digits(
    objective: Objective,
    optim: dict[str, AdamW],
    steps: int,
    sampler: Sampler,
    data: Data | None = None,
    *,
    clip: float = 1.0,
    guidance: float = 1.0,
    warm_start: Recipe | None = None,
) -> Recipe:
    return Recipe(
        teacher=Teacher("bundled:digits", guidance),
        objective=objective,
        data=data or DigitsData(),
        optim=optim,
        sampler=sampler,
        run=Run(steps=steps, ema=0.99, clip=clip, threads=1),
        evaluation=Evaluation(),
        warm_start=warm_start,
    )


def _grid(steps: int, rule: StepRule = Ddim()) -> Sampler:  # noqa: B008 (frozen)
    return Sampler(trailing(steps), rule)


# Trajectory


def digits_kd(steps: int = 1) -> Recipe:
    """Regression onto the teacher's own path; at one step onto noise-image pairs."""
    return _kd(steps, PAIRS)


def _kd(steps: int, data: Data) -> Recipe:
    return _on_digits(KD(distance=Huber(0.03)), {"student": REGRESSION}, 1200, _grid(steps), data)


def digits_tscd(steps: int = 1) -> Recipe:
    """Trajectory segments 4, 2, 1 (or from 8), each stage kept and serving as many steps."""
    recipe = None
    for segments in (k for k in (8, 4, 2, 1) if steps <= k <= max(steps, 4)):
        objective = TSCD(segments=Segments(segments, 16), to_edge=0.5)
        updates = 700 if recipe is None else 500
        sampler = _grid(segments, Tcd(0.0))
        recipe = _on_digits(objective, {"student": STUDENT}, updates, sampler, warm_start=recipe)
    if recipe is None or recipe.sampler.steps != steps:
        raise ValueError(f"steps must be 1, 2, 4 or 8; got {steps}")
    return recipe


def digits_tscd_unified(steps: int = 4) -> Recipe:
    """One LoRA for 1, 2, 4 and 8 steps; ``steps`` is what it is looked at and measured with."""
    others = tuple(k for k in (1, 2, 4, 8) if k != steps)
    if len(others) == 4:
        raise ValueError(f"steps must be 1, 2, 4 or 8; got {steps}")
    objective = TSCD(segments=Segments(steps, 16), also=others, to_edge=0.5)
    recipe = _on_digits(objective, {"student": REGRESSION}, 1200, _grid(steps, Tcd(0.0)))
    return replace(recipe, student=ADAPTERS)


def digits_pcm(steps: int = 4) -> Recipe:
    """Phased consistency: as many segments as steps, deterministic jumps from edge to edge."""
    if steps not in (1, 2, 4, 8):
        raise ValueError(f"steps must be 1, 2, 4 or 8; got {steps}")
    # at this learning rate the student runs after itself unless its target is a running average
    objective = PCM(segments=Segments(steps, 8 if steps == 1 else 16), target_decay=0.95, distance=L2())
    return _on_digits(objective, {"student": STUDENT}, 1200, _grid(steps))


def digits_pd(steps: int = 1) -> Recipe:
    """Progressive distillation from 16 steps of the teacher, halved until ``steps``; each stage kept."""
    recipe = None
    for k in (k for k in (8, 4, 2, 1) if k >= steps):
        first = PD(solver=Heun(), distance=Huber(0.03))
        objective = PD(follow="previous", distance=Huber(0.03)) if recipe else first
        updates = 500 if k == steps else 250
        recipe = _on_digits(objective, {"student": REGRESSION}, updates, _grid(k), warm_start=recipe)
    if recipe is None or recipe.sampler.steps != steps:
        raise ValueError(f"steps must be 1, 2, 4 or 8; got {steps}")
    return recipe


def digits_reflow(steps: int = 1) -> Recipe:
    """Rectified flow on the teacher's noise-image pairs, learned at all times; any grid that PAIRS' solver contains."""
    return _on_digits(Reflow(distance=Huber(0.03)), {"student": REGRESSION}, 1200, _grid(steps), PAIRS)


def digits_imagine_flash(steps: int = 1) -> Recipe:
    """Backward distillation: onto where eight steps of the teacher lead from the student's own states; no data.

    Without the shift, whose fresh noise draws samples together. Ends have the teacher's law where states have, hence
    the fresh noise between steps.
    """
    objective = ImagineFlash(gamma=(0.0, 1.0), noise="own", teacher_steps=8, solver=DpmPP2M(), distance=Huber(0.03))
    return _on_digits(
        objective, {"student": REGRESSION}, 450, _grid(steps, Renoise() if steps > 1 else Ddim()), Labels()
    )


def digits_guided(steps: int = 20) -> Recipe:
    """Guidance of 1.5 in one evaluation a step instead of two; as many steps as without distillation."""
    return _on_digits(GuidedDistillation(), {"student": REGRESSION}, 800, _grid(steps), guidance=1.5)


def digits_guided_lora(steps: int = 20) -> Recipe:
    """The same as a LoRA, which teacher and student share their network by."""
    return replace(digits_guided(steps), student=ADAPTERS)


# Score distillation


def digits_dmd2(steps: int = 1) -> Recipe:
    """Distribution matching with a GAN, from the teacher's weights; several steps by backward simulation."""
    optim = GAME | {"student": AdamW(2e-4, betas=(0.0, 0.999), decay="linear")}
    rollout = OneStep() if steps == 1 else BackwardSim(last_only=True)
    return _on_digits(_dmd2(rollout), optim, 800 if steps == 1 else 600, _grid(steps), clip=10.0)


def digits_dmd2_4step() -> Recipe:
    """The same at four steps."""
    return digits_dmd2(4)


def digits_f_distill(steps: int = 1) -> Recipe:
    """DMD2 weighted by the discriminator's density ratio, for the Jensen-Shannon divergence."""
    recipe = digits_dmd2(steps)
    gan = Gan(weight=1.0, times=Uniform(0.02, 0.98))
    return replace(recipe, objective=FDistill(base=replace(recipe.objective, gan=gan)))


def digits_sid(steps: int = 1) -> Recipe:
    """Score identity distillation, data-free."""
    optim = {"student": AdamW(2e-4, betas=(0.0, 0.999), decay="linear"), "critic": GAME["critic"]}
    rollout = OneStep() if steps == 1 else BackwardSim(last_only=True)
    objective = SiD(rollout=rollout, alpha=1.0, student_every=2)
    return _on_digits(objective, optim, 800 if steps == 1 else 600, _grid(steps), clip=10.0)


def digits_disback(steps: int = 1) -> Recipe:
    """DMD2 behind the record of how the teacher degrades to the untrained student."""
    recipe = digits_dmd2(steps)
    objective = DisBack(base=recipe.objective, record_steps=100, record_every=25, target_steps=40)
    return replace(recipe, objective=objective)


def digits_sds(steps: int = 1) -> Recipe:
    """Score distillation without a critic, for reference: it shrinks onto modes."""
    return _scored(SDS(rollout=_from_noise(steps)), steps)


def digits_vsd(steps: int = 1) -> Recipe:
    """SwiftBrush without guidance, which would cost diversity here: no data, no GAN."""
    return _scored(VSD(rollout=_from_noise(steps), null_rate=0.0, student_every=2), steps)


def digits_snoopi(steps: int = 1) -> Recipe:
    """SwiftBrush under random guidance, in a narrow range."""
    return _scored(SNOOPI(base=VSD(rollout=_from_noise(steps), student_every=2), guidance=(1.0, 1.5)), steps)


def digits_dmd(steps: int = 1) -> Recipe:
    """Distribution matching held by regression onto the teacher's pairs, or onto its path at several steps."""
    return _scored(DMD(rollout=_from_noise(steps), regression=KD(distance=Huber(0.03)), student_every=2), steps, PAIRS)


def digits_decoupled_dmd(steps: int = 1) -> Recipe:
    """Distribution matching and a push along guidance; little of the push, since it costs diversity here."""
    recipe = _scored(DecoupledDMD(rollout=_from_noise(steps), student_every=2), steps)
    return replace(recipe, teacher=replace(recipe.teacher, guidance=1.2))


def _scored(objective: Objective, steps: int, data: Data | None = None) -> Recipe:
    """Distribution matching from the teacher's weights, for the students that have no discriminator."""
    optim = {"student": AdamW(2e-4, betas=(0.0, 0.999), decay="linear"), "critic": GAME["critic"]}
    optim = {name: spec for name, spec in optim.items() if name in objective.needs}
    return _on_digits(objective, optim, 800 if steps == 1 else 600, _grid(steps), data, clip=10.0)


# Consistency


def digits_cd(steps: int = 2) -> Recipe:
    """Consistency distillation; fresh noise between the steps. As good as the eight steps it aims at: Heun's."""
    objective = CD(intervals=Doubling(4, 8, 600), solver=Heun())
    return _on_digits(objective, {"student": STUDENT}, 1200, _grid(steps, Renoise()))


def digits_ct(steps: int = 1) -> Recipe:
    """Consistency training: real digits and no teacher, but for the start."""
    _refuse_steps(steps)
    objective = CT(intervals=Doubling(8, 16, 600), spacing=Even(), target_decay=0.9)
    return _on_digits(objective, {"student": STUDENT}, 1200, _grid(steps, Renoise()))


def digits_ict(steps: int = 1) -> Recipe:
    """Improved consistency training; more of the noisy end than in the paper, for few updates."""
    _refuse_steps(steps)
    objective = ICT(Doubling(8, 32, 600), Karras(0.02), LogNormal(0.5, 2.0), Huber(0.03))
    return _on_digits(objective, {"student": STUDENT}, 1200, _grid(steps, Renoise()), clip=10.0)


def digits_ect(steps: int = 1) -> Recipe:
    """Easy consistency tuning: from denoising to consistency in a few stages."""
    _refuse_steps(steps)
    objective = ECT(times=LogNormal(0.0, 2.0), own=0.25, factor=3.0, stage_steps=300, distance=Huber(0.03))
    return _on_digits(objective, {"student": STUDENT}, 1200, _grid(steps, Renoise()), clip=10.0)


def digits_scm(steps: int = 1) -> Recipe:
    """Continuous-time consistency along the teacher's ODE."""
    _refuse_steps(steps)
    # The network bends between the whole time steps it has learned at: Jvp diverges, wide differences look past that.
    tangent, times = CentralDifference(0.3), LogNormal(-0.5, 1.6)
    objective = SCM(times=times, own=0.25, sigma_data=1.0, tangent=tangent, lag=0.3, warmup=100)
    return _on_digits(objective, {"student": GENTLE}, 800, _grid(steps, Renoise()))


def _refuse_steps(steps: int) -> None:
    if steps not in (1, 2, 4, 8):
        raise ValueError(f"steps must be 1, 2, 4 or 8; got {steps}")


def digits_icd(steps: int = 4) -> Recipe:
    """Invertible consistency: jumps down, and a second network's jumps back up to the noise of real digits."""
    if steps not in (1, 2, 4, 8):
        raise ValueError(f"steps must be 1, 2, 4 or 8; got {steps}")
    boundaries = Boundaries(trailing(steps), 8 if steps == 1 else 16)
    objective = ICD(boundaries=boundaries, start=0.01, preserve=0.3, distance=L2())
    return _on_digits(objective, {"student": STUDENT, "inverter": STUDENT}, 400, _grid(steps))


def digits_lcm(steps: int = 2) -> Recipe:
    """Latent consistency on a fixed grid; guidance 1, since more would cost diversity here."""
    objective = LCM(intervals=16, distance=ElementHuber(0.1))
    return _on_digits(objective, {"student": STUDENT}, 1200, _grid(steps, Renoise()))


def digits_lcm_lora(steps: int = 2) -> Recipe:
    """LCM-LoRA: adapters, no running average to aim at, and a narrow range of guidance baked in."""
    recipe = digits_lcm(steps)
    return replace(
        recipe,
        teacher=replace(recipe.teacher, guidance_range=(1.0, 1.2)),
        objective=replace(recipe.objective, target_decay=None),
        student=ADAPTERS,
    )


# Adversarial


def digits_ladd(steps: int = 1) -> Recipe:
    """Adversarial heads on the frozen teacher's features, nothing else."""
    rollout = OneStep() if steps == 1 else BackwardSim(last_only=True)
    objective = LADD(rollout=rollout, gan=Gan(weight=1.0, loss="softplus", times=LogNormal(-1.0, 1.0)))
    optim = {
        "student": AdamW(2e-4, betas=(0.0, 0.99), decay="linear"),
        "disc": AdamW(1e-3, betas=(0.0, 0.99), decay="linear"),
    }
    return _on_digits(objective, optim, 800, _grid(steps), clip=10.0)


def digits_gdd(steps: int = 1) -> Recipe:
    """A GAN on nearly clean digits. It reads the teacher's features: the classifier's are those it is judged by."""
    gan = Gan(weight=1.0, loss="softplus", times=LogNormal(-2.0, 0.5), r1=5e-5)
    return replace(digits_ladd(steps), objective=GDD(rollout=_from_noise(steps), gan=gan))


def digits_gdd_innate(steps: int = 1) -> Recipe:
    """GDD-I: the same with all convolutions but the first, the last and the shortcuts at the teacher's weights."""
    return replace(digits_gdd(steps), student=Weights(freeze=("conv1", "conv2", "conv")))


def digits_diffusion_gan(steps: int = 1) -> Recipe:
    """A GAN on digits whose noise grows as its discriminator gets sure of itself."""
    gan = Gan(weight=1.0, loss="softplus", times=NoiseChain(noise=0.5))
    # logits of patches are less sure than one of a whole image, hence the low target
    objective = DiffusionGAN(rollout=_from_noise(steps), gan=gan, shortest=0.1, target=0.2, ramp=20_000)
    return replace(digits_ladd(steps), objective=objective)


def _from_noise(steps: int) -> OneStep | BackwardSim:
    return OneStep() if steps == 1 else BackwardSim(last_only=True)


# Flow maps


def digits_mean_flow(steps: int = 1) -> Recipe:
    """MeanFlow's average velocities from the teacher's, half of them along the student's own grid.

    Differences over three tenths of the way: small networks are thrown off by the exact derivatives of their fast
    sinusoids of time.
    """
    objective = MeanFlow(
        velocity="teacher",
        unequal=1.0,
        to_grid=0.5,
        times=Uniform(),
        distance=Huber(0.03),
        tangent=CentralDifference(0.3),
    )
    return _on_digits(objective, {"student": GENTLE}, 800, _grid(steps))


def digits_mdt(steps: int = 1) -> Recipe:
    """Marginal-data transport; without its stabiliser, and with a long difference in its place."""
    objective = MDT(delta=0.3, normalise=0.0, times=Uniform())
    optim = {"student": replace(GENTLE, lr=1e-4)}  # twice as fast, its samples are rough
    return _on_digits(objective, optim, 800, _grid(steps, Renoise() if steps > 1 else Ddim()))


def digits_twinflow(steps: int = 1) -> Recipe:
    """TwinFlow along the teacher's velocity, with losses that are squares where they are small."""
    objective = TwinFlow(velocity="teacher", guidance=0.0, delta=0.1, c=0.3, target_decay=0.9)
    return _on_digits(objective, {"student": STUDENT}, 800, _grid(steps))


# Quickstart


def digits_quickstart_1step() -> Recipe:
    """The quickstart's one-step generator: regression as warm-up, then DMD2."""
    return _on_digits(_dmd2(OneStep()), GAME, 400, _grid(1), clip=10.0, warm_start=_kd(1, MANY_PAIRS))


def digits_quickstart_4step() -> Recipe:
    """The quickstart's four-step generator: regression along the path, then DMD2 by backward simulation."""
    objective = _dmd2(BackwardSim(last_only=True))
    return _on_digits(objective, GAME, 300, _grid(4), clip=10.0, warm_start=_kd(4, MANY_PAIRS))


def digits_best(steps: int = 1) -> Recipe:
    """The best that we know, for some ten minutes: the quickstart's chain with more of the teacher's samples.

    Then a gentler game: half the learning rates, a faint discriminator, and a little guidance for precision.
    """
    warm = _kd(steps, replace(MANY_PAIRS, count=24_000))
    warm = replace(warm, optim={"student": AdamW(2e-3, decay="cosine")}, run=replace(warm.run, steps=4000, ema=0.995))
    optim = {name: replace(spec, lr=spec.lr / 2) for name, spec in GAME.items()}
    objective = _dmd2(OneStep() if steps == 1 else BackwardSim(last_only=True), gan=0.2)
    recipe = _on_digits(objective, optim, 800, _grid(steps), clip=10.0, guidance=1.04, warm_start=warm)
    return replace(recipe, run=replace(recipe.run, ema=0.995))


def _dmd2(rollout: OneStep | BackwardSim, gan: float = 1.0) -> DMD2:
    # The critic is small and near its student from the start, so two updates per student update do.
    return DMD2(rollout=rollout, gan=Gan(weight=gan), student_every=2)
