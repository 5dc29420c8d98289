"""Images of an exported student in a live pipeline, by the few-step loop instead of the pipeline's own call.

The pipeline's call spends time on what a student does not need: it looks through all parts for offloading hooks, asks
its scheduler, counts progress. Everything that differs between pipelines comes from the family's row, as in training.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.exported import live_student
from stepdistill.inference.compiling import CudaGraph
from stepdistill.inference.few_step import FewStep
from stepdistill.inference.kv_cache import KVCache
from stepdistill.inference.weights import dtype_of
from stepdistill.models.denoiser import Cond
from stepdistill.models.families.base import Size, family_of

PLAINLY_GUIDED = ("sd", "sdxl", "sd3", "pixart", "sana", "wan")
"""Families whose pipelines guide by ``null + scale (cond - null)``; others rescale, or count scales from 0."""
TAKES = ("guidance_scale", "negative_prompt")


class StudentSampler:
    """Samples the exported student in a live pipeline. Buffers of noise and tables of times are made once a batch size.

    Args:
        pipeline: on its device, and left as it is.
        kv: the cache in its network, if there is one.
        cuda_graph: record loop and decoder once for each batch size, and replay them.

    Raises:
        ValueError: if the pipeline holds no exported student.
    """

    def __init__(self, pipeline: DiffusionPipeline, kv: KVCache | None = None, *, cuda_graph: bool = False):
        self.pipeline, self.kv, self.cuda_graph = pipeline, kv, cuda_graph
        self.student = live_student(pipeline)
        self.family = family_of(pipeline)
        self.record: dict[str, Any] = pipeline.scheduler.config["_student"]
        sides = [self.record["call"].get(side) for side in ("num_frames", "height", "width")]
        self.size: Size | None = tuple(side for side in sides if side is not None) or None
        self._loops: dict[float, FewStep] = {}
        self._buffers: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._graphs: dict[tuple[Any, ...], CudaGraph] = {}

    @property
    def device(self) -> torch.device:
        """Of the network."""
        return next(self.student.net.parameters()).device

    def images(
        self,
        wanted: Sequence[str] | Sequence[int] | int,
        rngs: Sequence[torch.Generator],
        *,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
    ) -> Tensor:
        """A batch of samples, the same as the pipeline's own call makes, to rounding.

        Args:
            wanted: prompts, class labels, or how many.
            rngs: one for each sample.
            guidance_scale: None is the recorded one.
            negative_prompt: for students that can be guided: one for all, or one for each sample.

        Returns:
            (B, C, H, W), of videos (B, T, C, H, W), in [0, 1], float32; a CUDA graph overwrites them in the next call.

        Raises:
            ValueError: if the student cannot be guided so.
        """
        loop, cond, null = self._conditions(wanted, len(rngs), guidance_scale, negative_prompt)
        with torch.inference_mode():
            noise, fresh = self.noise(rngs)
            return self.sample(loop, noise, fresh, loop.conditions(cond, null))

    def sample(self, loop: FewStep, noise: Tensor, fresh: Tensor | None, cond: Cond) -> Tensor:
        """Noise and conditions to images: the part that holds all network evaluations."""
        times, rows = loop.table(len(noise), noise.device)
        if not self.cuda_graph:
            return self.decode(loop.run(noise, fresh, cond, times, rows))

        kept = None if self.kv is None else self.kv.find(cond["prompt"])
        names, layers = list(cond), len(kept or ())

        def whole(noise: Tensor, *rest: Tensor) -> Tensor:
            values = list(rest)
            drawn = None if fresh is None else values[layers]
            given = dict(zip(names, values[len(values) - len(names) :], strict=True))
            with nullcontext() if self.kv is None else self.kv.answering(values[:layers] if layers else None):
                return self.decode(loop.run(noise, drawn, given, times, rows))

        tensors = [noise, *(kept or ()), *([] if fresh is None else [fresh]), *cond.values()]
        key = (loop.guidance, *((name, cond[name].shape) for name in names), noise.shape, layers)
        if key not in self._graphs:
            self._graphs[key] = CudaGraph(whole, tensors)
        return self._graphs[key](tensors)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images in [0, 1], (B, C, H, W), or videos (B, T, C, H, W)."""
        vae = getattr(self.pipeline, "vae", None)  # not .components, which looks at signatures
        if vae is not None:
            # as the pipelines do: SDXL's decoder overflows in float16
            dtype = dtype_of(vae)
            lifted = dtype == torch.float16 and bool(vae.config.get("force_upcast"))
            if lifted:
                dtype = torch.float32
                vae.to(dtype)
            images = self.family.decode(self.pipeline, latents.to(dtype))
            if lifted:
                vae.to(torch.float16)
        else:
            images = self.family.decode(self.pipeline, latents)
        images = (images.float() / 2 + 0.5).clamp(0, 1)
        return images.movedim(2, 1) if images.ndim == 5 else images

    def noise(self, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Tensor | None]:
        """Everything that a batch draws, in the order in which the pipeline would draw it.

        FLUX.2's draws the noise between steps in an order of its own: re-noising students of it get other images here.

        Returns:
            Start (B, ...) and steps (K - 1, B, ...), or None where they draw nothing; overwritten by the next call.
        """
        shape, plan = tuple(self.record["shape"]), self._loop(1.0).plan
        n, k = len(rngs), len(plan.times)
        if n not in self._buffers:
            with torch.inference_mode(False):  # or they could not be written to outside of it
                self._buffers[n] = torch.empty(n, *shape), torch.empty(k - 1, n, *shape) if plan.draws else None
        start, steps = self._buffers[n]
        for i, rng in enumerate(rngs):
            torch.randn(shape, generator=rng, out=start[i])
        if steps is not None:
            # in the order of the pipeline's own latents; where it passes no generator on, from torch's own
            places = self.family.pack(torch.arange(start[0].numel()).view(1, *shape)).flatten()
            for step in steps.view(k - 1, n, -1):
                if self.record["seeded"]:
                    for i, rng in enumerate(rngs):
                        step[i, places] = torch.randn(len(places), generator=rng)
                else:
                    step[:, places] = torch.randn(n, len(places))
        return start.to(self.device), None if steps is None else steps.to(self.device)

    def _loop(self, guidance: float) -> FewStep:
        if guidance not in self._loops:
            self._loops[guidance] = FewStep(self.student, guidance)
        return self._loops[guidance]

    def _conditions(
        self, wanted: Any, n: int, guidance: float | None, negative: str | Sequence[str] | None
    ) -> tuple[FewStep, Cond, Cond | None]:
        family, pipeline, net = self.family, self.pipeline, self.student.net
        scale = self.record["call"].get("guidance_scale") if guidance is None else guidance
        told = family.guidance_input(net)
        if scale is None and told:
            scale = inspect.signature(pipeline.__call__).parameters["guidance_scale"].default
        with torch.no_grad():
            if family.encode is not None:
                cond = dict(family.encode(pipeline, wanted, self.size))
            else:
                labels = {} if isinstance(wanted, int) else {"labels": torch.tensor(wanted, device=self.device)}
                cond = dict(family.cond(net, labels))
            if told:
                return self._loop(1.0), cond | {"guidance": torch.full((n,), float(scale), device=self.device)}, None
            if scale is None or scale <= 1:  # as pipelines understand it
                return self._loop(1.0), cond, None
            if family.name not in PLAINLY_GUIDED:
                raise ValueError(
                    f"guidance {scale}: the few-step loop does not guide {family.name}; leave optimize out"
                )
            each = [negative or ""] if negative is None or isinstance(negative, str) else list(negative)
            if len(each) not in (1, n):
                raise ValueError(f"negative_prompt: {len(each)} for {n} samples; give one, or one for each")
            nulls = [family.null(pipeline, text, self.size) for text in each]
            return self._loop(float(scale)), cond, {k: torch.cat([null[k] for null in nulls]) for k in nulls[0]}
