"""Negative prompts for students that run without guidance, one or a few steps, by attention alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.kernels import Backend
from stepdistill.models.denoiser import Cond
from stepdistill.models.families import family_of
from stepdistill.steering.away import Away, steered

FAMILIES = ("sd", "sdxl", "pixart", "sd3", "flux")


def negative(
    pipeline: DiffusionPipeline,
    scale: float,
    method: Literal["nasa", "nag"] = "nasa",
    *,
    tau: float = 2.5,
    alpha: float = 0.25,
    prefer: Backend | None = None,
) -> Steered:
    """A pipeline whose students heed negative prompts without guidance: the network still runs once a step.

    ::

        pipe = negative(load_exported("runs/mine/pipeline"), scale=0.5)
        images = pipe("a circle", negative_prompt="red").images

    NASA subtracts what cross-attention makes of the negative prompt, so that features shrink by (1 - scale) where both
    prompts say the same: 0.1 for SD 1.5, 0.2 for 2.1, 0.5 for PixArt, up to 1 for SDXL (arXiv:2412.02687). NAG limits
    what it adds, which suits networks of joint attention: scale 4 to 8 (arXiv:2505.21179). In joint attention NASA
    subtracts from the image's own features too; it is there for comparison.

    Args:
        pipeline: SD, SDXL, PixArt, SD3 or FLUX.1; nothing of it changes outside a call.
        scale: how strongly; 0 is the pipeline itself.
        method: ``nasa`` or ``nag``.
        tau: NAG's bound on a token's length.
        alpha: NAG's share of the extrapolation.
        prefer: backend of cross-attention; None chooses.

    Raises:
        ValueError: for another kind of pipeline, or values out of range.
    """
    return Steered(pipeline, Away(scale, method, tau, alpha), prefer)


class Steered:
    """What ``negative`` returns: call it as the pipeline."""

    def __init__(self, pipeline: DiffusionPipeline, away: Away, prefer: Backend | None = None) -> None:
        self.pipeline, self.away, self.prefer = pipeline, away, prefer
        self.family = family_of(pipeline)
        if self.family.name not in FAMILIES:
            raise ValueError(f"{type(pipeline).__name__}: steering knows the families {', '.join(FAMILIES)}")

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        **call: Any,
    ) -> Any:
        """Images of the prompts, steered away from the negative ones.

        Args:
            prompt: one or several.
            negative_prompt: one for all, or one each; None or ``scale`` 0 leaves the pipeline as it is.
            num_images_per_prompt: of each.
            call: what the pipeline takes besides. What the student was exported with comes first, then this.

        Raises:
            ValueError: if negative prompts are not as many, or guidance is asked for besides.
        """
        record = self.pipeline.scheduler.config.get("_student") or {}
        call = self.family.sampling(self.pipeline) | dict(record.get("call", {})) | call
        self._refuse_guidance(call)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if negative_prompt is None or self.away.scale == 0:
            return self.pipeline(prompts, num_images_per_prompt=num_images_per_prompt, **call)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(negatives) != len(prompts):
            raise ValueError(f"negative_prompt: {len(negatives)} for {len(prompts)} prompts; give one, or one each")
        with torch.no_grad():
            towards, away = (self.family.encode(self.pipeline, texts, None) for texts in (prompts, negatives))
        given = {"prompt_embeds": torch.cat([towards["prompt"], away["prompt"]], 1)}
        if "pooled" in towards:
            given["pooled_prompt_embeds"] = towards["pooled"]
        if self.family.name == "pixart":
            given["prompt_attention_mask"] = torch.cat([_mask(towards), _mask(away)], 1)
        given = {name: x.repeat_interleave(num_images_per_prompt, 0) for name, x in given.items()}
        net = self.pipeline.components[self.family.module]
        tokens = towards["prompt"].shape[1], away["prompt"].shape[1]
        with steered(net, self.away, *tokens, self.prefer):
            return self.pipeline(**given, **call)

    def _refuse_guidance(self, call: dict[str, Any]) -> None:
        net = self.pipeline.components[self.family.module]
        names = ["true_cfg_scale"] if self.family.name == "flux" else ["guidance_scale"]
        if self.family.guidance_input(net):  # the scale is an input there, not a second evaluation
            names.remove("guidance_scale") if "guidance_scale" in names else None
        for name in names:
            if call.get(name, 1.0) > 1.0:
                raise ValueError(
                    f"{name} {call[name]}: guidance runs the network a second time on the negative prompt; leave it at "
                    "1, or use the pipeline itself"
                )


def _mask(cond: Cond) -> Tensor:
    mask = cond["mask"]
    if (mask[:, 1:] > mask[:, :-1]).any():
        raise ValueError("a prompt's padding stands before its tokens; a tokenizer that pads at the end is expected")
    return mask
