"""Stable Diffusion 1.x and 2.x: a latent UNet with cross-attention, eps or v, on a VP table."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from stepdistill.models.denoiser import Call, Cond
from stepdistill.models.families.base import (
    Family,
    Size,
    Tap,
    add_family,
    guidance_embedding,
    pixels,
    table_index,
    vae_decode,
    vae_encode,
    vp_kind,
    vp_schedule,
)

UNET_LORA = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
"""The layers that LCM-LoRA adapts (arXiv:2311.05556)."""


def _serves(net: nn.Module, scheduler: SchedulerMixin) -> bool:
    return net.config.addition_embed_type is None and net.config.class_embed_type is None


def _call(scheduler: SchedulerMixin) -> Call:
    n = scheduler.config.num_train_timesteps

    def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return net(
            x_t,
            table_index(t, n, x_t),
            encoder_hidden_states=cond["prompt"],
            timestep_cond=told_guidance(net, cond),
            return_dict=False,
        )[0]

    return call


def told_guidance(net: nn.Module, cond: Cond) -> Tensor | None:
    """The embedded guidance scale of a UNet that takes one; None for others.

    Raises:
        ValueError: if it takes one and ``cond`` has none.
    """
    width = net.config.time_cond_proj_dim
    if width is None:
        return None
    if "guidance" not in cond:
        raise ValueError("this network is told the guidance scale; give cond['guidance'], (B,)")
    return guidance_embedding(cond["guidance"], width)


def _encode(pipeline: DiffusionPipeline, prompts: Sequence[str], size: Size | None) -> Cond:
    device = pipeline.text_encoder.device
    return {"prompt": pipeline.encode_prompt(list(prompts), device, 1, do_classifier_free_guidance=False)[0]}


def _null(pipeline: DiffusionPipeline, negative: str, size: Size | None) -> Cond:
    return _encode(pipeline, [negative], size)


def unet_shape(pipeline: DiffusionPipeline, size: Size | None) -> tuple[int, ...]:
    """Latents of a UNet pipeline: (C, H / f, W / f)."""
    config, f = pipeline.unet.config, pipeline.vae_scale_factor
    side = config.sample_size
    default = (side * f, side * f) if isinstance(side, int) else tuple(s * f for s in side)
    height, width = pixels(pipeline, size, default, f * 2 ** (len(config.block_out_channels) - 1))
    return config.in_channels, height // f, width // f


def unet_taps(net: nn.Module) -> tuple[Tap, ...]:
    """Ends of the down blocks and of the middle."""
    widths = net.config.block_out_channels
    return (*(Tap(f"down_blocks.{i}", c) for i, c in enumerate(widths)), Tap("mid_block", widths[-1]))


def takes_guidance(net: nn.Module) -> bool:
    """UNets with ``time_cond_proj_dim``, as LCM's."""
    return net.config.time_cond_proj_dim is not None


SD = add_family(
    Family(
        name="sd",
        net_class="UNet2DConditionModel",
        module="unet",
        serves=_serves,
        schedule=vp_schedule,
        kind=vp_kind,
        call=_call,
        encode=_encode,
        null=_null,
        sample_shape=unet_shape,
        taps=unet_taps,
        decode=vae_decode,
        to_latents=vae_encode,
        guidance_input=takes_guidance,
        lora_targets=UNET_LORA,
        sampling=lambda pipeline: {"guidance_scale": 1.0},
    )
)
