"""Stable Diffusion XL: a latent UNet with two text towers and a size condition, on a VP table or EDM's path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from stepdistill.models.denoiser import Call, Cond
from stepdistill.models.families.base import Family, Size, add_family, table_index, vp_kind, vp_schedule
from stepdistill.models.families.edm import clean, edm_schedule, is_edm, preconditioned
from stepdistill.models.families.sd import UNET_LORA, takes_guidance, told_guidance, unet_shape, unet_taps


def _serves(net: nn.Module, scheduler: SchedulerMixin) -> bool:
    # Kolors has a projection of its text, inpainting and editing UNets have more channels in than out
    config = net.config
    plain = config.encoder_hid_dim_type is None and config.in_channels == config.out_channels
    return config.addition_embed_type == "text_time" and plain


def _net_call(net: nn.Module, x: Tensor, told: Tensor, cond: Cond) -> Tensor:
    return net(
        x,
        told,
        encoder_hidden_states=cond["prompt"],
        timestep_cond=told_guidance(net, cond),
        added_cond_kwargs={"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]},
        return_dict=False,
    )[0]


def _call(scheduler: SchedulerMixin) -> Call:
    if is_edm(scheduler):
        return preconditioned(scheduler, _net_call)
    n = scheduler.config.num_train_timesteps
    return lambda net, x_t, t, cond: _net_call(net, x_t, table_index(t, n, x_t), cond)


def _cond(pipeline: DiffusionPipeline, prompt: Tensor, pooled: Tensor, size: Size | None) -> Cond:
    """With ``time_ids`` (B, 6): the size that an image is cut from, the cut's corner, the size that is made."""
    side = [s * pipeline.vae_scale_factor for s in unet_shape(pipeline, size)[1:]]
    time_ids = torch.tensor([[*side, 0, 0, *side]], dtype=prompt.dtype, device=prompt.device)
    return {"prompt": prompt, "pooled": pooled, "time_ids": time_ids.repeat(len(prompt), 1)}


def _encode(pipeline: DiffusionPipeline, prompts: Sequence[str], size: Size | None) -> Cond:
    device = pipeline.text_encoder_2.device
    prompt, _, pooled, _ = pipeline.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
    return _cond(pipeline, prompt, pooled, size)


def _null(pipeline: DiffusionPipeline, negative: str, size: Size | None) -> Cond:
    # No negative prompt is not the same as an empty one: ``force_zeros_for_empty_prompt`` makes zeros of it
    _, prompt, _, pooled = pipeline.encode_prompt(
        [""], device=pipeline.text_encoder_2.device, negative_prompt=[negative] if negative else None
    )
    return _cond(pipeline, prompt, pooled, size)


def _moments(pipeline: DiffusionPipeline, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean and standard deviation (C, 1, 1) of the VAE's latents, which few SDXL models have (Playground)."""
    mean, std = (pipeline.vae.config.get(key) for key in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return 0.0, 1.0
    return like.new_tensor(mean)[:, None, None], like.new_tensor(std)[:, None, None]


def _decode(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    mean, std = _moments(pipeline, latents)
    return pipeline.vae.decode(latents * std / pipeline.vae.config.scaling_factor + mean).sample


def _to_latents(pipeline: DiffusionPipeline, images: Tensor, rng: torch.Generator | None) -> Tensor:
    law = pipeline.vae.encode(images).latent_dist
    latents = law.mode() if rng is None else law.sample(rng)
    mean, std = _moments(pipeline, latents)
    return (latents - mean) / std * pipeline.vae.config.scaling_factor


SDXL = add_family(
    Family(
        name="sdxl",
        net_class="UNet2DConditionModel",
        module="unet",
        serves=_serves,
        schedule=lambda scheduler: edm_schedule(scheduler) if is_edm(scheduler) else vp_schedule(scheduler),
        kind=lambda scheduler: clean(scheduler) if is_edm(scheduler) else vp_kind(scheduler),
        call=_call,
        encode=_encode,
        null=_null,
        sample_shape=unet_shape,
        taps=unet_taps,
        decode=_decode,
        to_latents=_to_latents,
        guidance_input=takes_guidance,
        lora_targets=UNET_LORA,
        sampling=lambda pipeline: {"guidance_scale": 1.0},
    )
)
