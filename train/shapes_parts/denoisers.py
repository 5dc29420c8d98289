"""Training of the two teachers: a UNet with v-prediction and an SD3 transformer with flow matching."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from shapes_parts.loop import RUNS, Plan, Trained, train
from shapes_parts.text import EMBED, T5_LENGTH, T5_WIDTH, WIDTH, clip_ids, clip_tokenizer, t5_ids, t5_tokenizer
from shapes_parts.vae import latents_of
from stepdistill.checkpoint import write_atomically
from stepdistill.evaluation.shapes import ShapesClassifier
from stepdistill.shapes import align, captions, draw

SD = Plan("sd", steps=5000, lr=1e-3, ema=0.999, decay=0.3, warmup=100)
SD3 = Plan("sd3", steps=6000, lr=1e-3, ema=0.999, decay=0.3, warmup=100)
BATCH = 64
SCENES = 98_304
NULL_CHANCE = 0.1
CAPTION_DROPOUT = 0.15
GUIDANCE = 2.0


@dataclass(frozen=True)
class Encoded:
    """What the denoisers learn from."""

    latents: Tensor  # (N, 4, 8, 8) float32, scaled
    attributes: Tensor  # (N, 7)

    def batch(self, step: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Latents and captions of one step; one caption in ten is empty, for classifier-free guidance."""
        epoch, start = divmod(step * BATCH, len(self.latents) - len(self.latents) % BATCH)
        order = torch.randperm(len(self.latents), generator=torch.Generator().manual_seed(epoch))
        rows = order[start : start + BATCH]
        texts = captions(self.attributes[rows], step, CAPTION_DROPOUT).texts
        null = torch.rand(BATCH, generator=generator) < NULL_CHANCE
        return self.latents[rows], ["" if none else text for text, none in zip(texts, null.tolist(), strict=True)]


def encode_scenes(vae: AutoencoderKL) -> Encoded:
    """Scaled latents of the training scenes, kept in ``runs/shapes/latents.safetensors``."""
    path = RUNS / "latents.safetensors"
    if not path.exists():
        scenes = draw(SCENES, seed=10)
        latents = (latents_of(vae, scenes.images) * vae.config.scaling_factor).contiguous()
        write_atomically(path, lambda p: save_file({"latents": latents, "attributes": scenes.attributes}, p))
    return Encoded(**load_file(path))


def quantiles(n: int, generator: torch.Generator) -> Tensor:
    """One uniform number from each n-th of 0..1: batches differ less, and so do gradients."""
    return (torch.arange(n) + torch.rand(n, generator=generator)) / n


def sd_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise table, v-prediction, trailing steps."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def make_unet() -> UNet2DConditionModel:
    """2.4 M parameters: cross-attention at 8x8 and at 4x4."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # number of heads, by diffusers' old name
        norm_num_groups=8,
    )


def make_transformer() -> SD3Transformer2DModel:
    """2.0 M parameters."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=96,
        pooled_projection_dim=2 * EMBED,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )


def time_cdf(alphas_cumprod: Tensor, mean: float = -0.5, std: float = 2.0, uniform: float = 0.4) -> Tensor:
    """Cumulative distribution (1000,) float64 of training times: normal in log-SNR, mixed with uniform in t."""
    alphas = alphas_cumprod.double()
    log_snr = torch.log(alphas / (1 - alphas))
    density = torch.exp(-0.5 * ((log_snr - mean) / std) ** 2) * -torch.gradient(log_snr)[0]
    return ((1 - uniform) * density / density.sum() + uniform / len(alphas)).cumsum(0)


def train_sd(data: Encoded, encoder: CLIPTextModel, vae: AutoencoderKL, judge: ShapesClassifier) -> Trained:
    """Mean squared v error."""
    alphas_cumprod = sd_scheduler().alphas_cumprod
    cdf = time_cdf(alphas_cumprod)

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        x0, texts = data.batch(step, generator)
        with torch.no_grad():
            cond = encoder(clip_ids(texts)).last_hidden_state
        t = torch.searchsorted(cdf, quantiles(BATCH, generator).double()).clamp(max=len(cdf) - 1)
        eps = torch.randn(x0.shape, generator=generator)
        alpha = alphas_cumprod[t].sqrt()[:, None, None, None]
        sigma = (1 - alphas_cumprod[t]).sqrt()[:, None, None, None]
        v = model(alpha * x0 + sigma * eps, t, cond).sample
        return {"loss": (v - (alpha * eps - sigma * x0)).square().mean()}

    def watch(average: nn.Module) -> str:
        return str(alignment(sd_pipeline(average, encoder, vae), judge, 120, 20, GUIDANCE))

    def make() -> nn.Module:
        return make_unet().to(memory_format=torch.channels_last)  # a tenth faster

    return train(SD, make, loss, watch, watch_every=500)


def train_sd3(
    data: Encoded,
    encoder: CLIPTextModelWithProjection,
    t5: T5EncoderModel,
    vae: AutoencoderKL,
    judge: ShapesClassifier,
) -> Trained:
    """Mean squared velocity error, times by the logistic of a normal."""

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        x0, texts = data.batch(step, generator)
        with torch.no_grad():
            tokens, pooled = sd3_cond(encoder, t5, texts)
        t = torch.special.ndtri(quantiles(BATCH, generator).clamp(1e-4, 1 - 1e-4)).sigmoid()
        eps = torch.randn(x0.shape, generator=generator)
        share = t[:, None, None, None]
        v = model((1 - share) * x0 + share * eps, tokens, pooled, 1000 * t).sample
        return {"loss": (v - (eps - x0)).square().mean()}

    def watch(average: nn.Module) -> str:
        return str(alignment(sd3_pipeline(average, encoder, t5, vae), judge, 120, 20, GUIDANCE))

    return train(SD3, make_transformer, loss, watch, watch_every=500)


def sd3_cond(encoder: CLIPTextModelWithProjection, t5: T5EncoderModel, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Tokens (B, 32, 192) and pooled states (B, 128), as ``StableDiffusion3Pipeline.encode_prompt`` makes them."""
    out = encoder(clip_ids(texts), output_hidden_states=True)
    clip = torch.cat([out.hidden_states[-2]] * 2, -1)
    return torch.cat([clip, t5(t5_ids(texts)).last_hidden_state], 1), torch.cat([out.text_embeds] * 2, -1)


def sd_pipeline(unet: nn.Module, encoder: CLIPTextModel, vae: AutoencoderKL) -> StableDiffusionPipeline:
    """The stock pipeline."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=sd_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd3_pipeline(
    transformer: nn.Module, encoder: CLIPTextModelWithProjection, t5: T5EncoderModel, vae: AutoencoderKL
) -> StableDiffusion3Pipeline:
    """The stock pipeline, with the same CLIP encoder in both places."""
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=encoder,
        tokenizer=clip_tokenizer(),
        text_encoder_2=encoder,
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer(),
    )


def sample(pipe: DiffusionPipeline, texts: list[str], steps: int, guidance: float, seed: int) -> Tensor:
    """Images (N, 3, 32, 32) in [-1, 1], rounded as uint8 would."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    extra = {"max_sequence_length": T5_LENGTH} if isinstance(pipe, StableDiffusion3Pipeline) else {}
    parts = []
    for start in range(0, len(texts), 100):
        images = pipe(
            texts[start : start + 100],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="pt",
            **extra,
        ).images
        parts.append((images * 255).round() / 127.5 - 1)
    return torch.cat(parts)


def alignment(
    pipe: DiffusionPipeline,
    judge: ShapesClassifier,
    n: int,
    steps: int,
    guidance: float,
    dropout: float = 0.0,
    seed: int = 7,
) -> dict[str, float]:
    """Share of images that have all that their caption names, and the same of each attribute; unseen scenes."""
    scenes = draw(n, 1_000 + seed)
    told = captions(scenes.attributes, seed, dropout)
    seen = judge.attributes(sample(pipe, told.texts, steps, guidance, seed))
    right = align(seen, scenes.attributes, told.named)
    pair = scenes.attributes[:, 0] > 0
    each = ((seen == scenes.attributes) & told.named).sum(0) / told.named.sum(0)
    names = ("layout", "background", "shape", "colour", "size", "shape2", "colour2")
    scores = {"exact": right, "single": right[~pair], "pair": right[pair]}
    scores = {name: round(float(value.double().mean()), 3) for name, value in scores.items()}
    return scores | {name: round(float(value), 3) for name, value in zip(names, each, strict=True)}
