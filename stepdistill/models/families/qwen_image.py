"""Qwen-Image: an MM-DiT over 2x2 patches, masked text, latents of a video VAE at one frame.

Its pipeline's guidance rescales every patch of the guided velocity to the length of the conditional one; ``Guided`` is
plain classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn
from torch.nn.functional import pad

from stepdistill.models.denoiser import Call, Cond
from stepdistill.models.families.base import Family, Size, Tap, add_family, rectified_flow, thirds, velocity
from stepdistill.models.families.flux import pack, packed_shape, prompt_tokens, unpack


def _serves(net: nn.Module, scheduler: SchedulerMixin) -> bool:
    return not net.config.use_additional_t_cond  # Layered is another model


def _call(scheduler: SchedulerMixin) -> Call:
    def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = x_t.shape[2:]
        tokens = net(
            pack(x_t),
            encoder_hidden_states=cond["prompt"],
            encoder_hidden_states_mask=cond["mask"],
            timestep=t.to(x_t.dtype),
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpack(tokens, height)

    return call


def _encode(pipeline: DiffusionPipeline, prompts: Sequence[str], size: Size | None) -> Cond:
    device, length = pipeline.text_encoder.device, prompt_tokens(pipeline)
    prompt, mask = pipeline.encode_prompt(list(prompts), device=device, max_sequence_length=length)
    mask = prompt.new_ones(prompt.shape[:2]) if mask is None else mask  # None where all are of one length
    room = length - prompt.shape[1]
    return {"prompt": pad(prompt, (0, 0, 0, room)), "mask": pad(mask.bool(), (0, room))}


def _null(pipeline: DiffusionPipeline, negative: str, size: Size | None) -> Cond:
    return _encode(pipeline, [negative], size)


def _law_of_latents(pipeline: DiffusionPipeline, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation, each (C, 1, 1)."""
    config = pipeline.vae.config
    mean, std = (like.new_tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))
    return mean, std


def _decode(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    mean, std = _law_of_latents(pipeline, latents)
    return pipeline.vae.decode((latents * std + mean).unsqueeze(2)).sample[:, :, 0]


def _to_latents(pipeline: DiffusionPipeline, images: Tensor, rng: torch.Generator | None) -> Tensor:
    mean, std = _law_of_latents(pipeline, images)
    law = pipeline.vae.encode(images.unsqueeze(2)).latent_dist
    return ((law.mode() if rng is None else law.sample(rng)).squeeze(2) - mean) / std


def _taps(net: nn.Module) -> tuple[Tap, ...]:
    blocks = thirds([f"transformer_blocks.{i}" for i in range(len(net.transformer_blocks))])
    return tuple(Tap(block, net.inner_dim, output=1, tokens=True) for block in blocks)  # (text, image)


QWEN_IMAGE = add_family(
    Family(
        name="qwen_image",
        net_class="QwenImageTransformer2DModel",
        module="transformer",
        serves=_serves,
        schedule=rectified_flow,
        kind=velocity,
        call=_call,
        encode=_encode,
        null=_null,
        sample_shape=packed_shape,
        taps=_taps,
        decode=_decode,
        to_latents=_to_latents,
        pack=pack,
        # of the text only keys and values: the last block's text goes nowhere, so the rest would get no gradient there
        lora_targets=(
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_v_proj",
            "img_mlp.net.0.proj", "img_mlp.net.2", "img_mod.1", "txt_mod.1",
        ),
        sampling=lambda pipeline: {"true_cfg_scale": 1.0, "max_sequence_length": prompt_tokens(pipeline)},
        passes_sigmas=True,
    )
)  # fmt: skip
