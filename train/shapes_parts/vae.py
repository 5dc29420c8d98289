"""Training of the autoencoder: an AutoencoderKL of four latent channels, each latent cell 4x4 pixels."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from shapes_parts.judges import Stream, scaled
from shapes_parts.loop import Plan, Trained, train
from stepdistill.evaluation.shapes import ShapesClassifier
from stepdistill.shapes import align, draw

VAE = Plan("vae", steps=2600, lr=2e-3, ema=0.995, decay=0.4)
DECODER = Plan("decoder", steps=2500, lr=1e-3, ema=0.995, decay=0.5)
BATCH = 16
KL = 2e-5
LATENT_NOISE = 0.05  # of the latents' deviation: about what a denoiser gets wrong
PERCEPTUAL = 0.5
STAGES = (1, 3, 5)  # after 16x16 pixels, after 8x8, and the features


def make_vae() -> AutoencoderKL:
    """0.43 M parameters, factor 4; few norm groups, for more would erase colours."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def perceptual(judge: ShapesClassifier, images: Tensor, copies: Tensor) -> Tensor:
    """Mean squared difference of the judge's activations, each stage divided by its mean square."""
    total = torch.zeros(())
    for stage, (real, fake) in enumerate(zip(judge.layers(images), judge.layers(copies), strict=True)):
        if stage in STAGES:
            total = total + F.mse_loss(fake, real) / real.square().mean()
    return total


def train_vae(judge: ShapesClassifier) -> Trained:
    """Pixels, the judge's activations and a weak KL term, on fresh scenes."""
    stream = Stream(BATCH, seed=2_000_000)

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(model, AutoencoderKL)
        images = scaled(stream(step).images)
        posterior = model.encode(images).latent_dist
        terms = likeness(judge, images, model.decode(posterior.sample(generator)).sample)
        kl = posterior.kl().mean()
        return {"loss": terms["loss"] + KL * kl, "seen": terms["seen"], "mse": terms["mse"], "kl": kl}

    return train(VAE, make_vae, loss, lambda average: watch(average, judge), watch_every=1000)


def train_decoder(vae: AutoencoderKL, judge: ShapesClassifier) -> Trained:
    """Go on with the decoder alone, on slightly noisy latents; a denoiser trained on the latents stays valid."""
    stream = Stream(BATCH, seed=3_000_000)

    def make() -> nn.Module:
        model = copy.deepcopy(vae).requires_grad_(True)
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
        return model

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(model, AutoencoderKL)
        images = scaled(stream(step).images)
        with torch.no_grad():
            latents = model.encode(images).latent_dist.mean
        noise = LATENT_NOISE / vae.config.scaling_factor * torch.randn(latents.shape, generator=generator)
        return likeness(judge, images, model.decode(latents + noise).sample)

    return train(DECODER, make, loss, lambda average: watch(average, judge), watch_every=500)


def likeness(judge: ShapesClassifier, images: Tensor, copies: Tensor) -> dict[str, Tensor]:
    """Absolute and squared error, and how different the judge finds the two."""
    mse, seen = F.mse_loss(copies, images), perceptual(judge, images, copies)
    return {"loss": F.l1_loss(copies, images) + mse + PERCEPTUAL * seen, "seen": seen, "mse": mse}


@torch.no_grad()
def latents_of(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Means of the latents, unscaled, of uint8 images."""
    return torch.cat([vae.encode(scaled(part)).latent_dist.mean for part in images.split(256)])


@torch.no_grad()
def decoded(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images in [-1, 1] of unscaled latents, rounded as uint8 would."""
    images = torch.cat([vae.decode(part).sample for part in latents.split(256)])
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def reconstruction(vae: AutoencoderKL, judge: ShapesClassifier, n: int, seed: int) -> dict[str, float]:
    """PSNR of reconstructions, and share of them in which the judge sees every attribute right."""
    scenes = draw(n, seed)
    copies = decoded(vae, latents_of(vae, scenes.images))
    mse = (copies - scaled(scenes.images)).square().mean((1, 2, 3))
    right = align(judge.attributes(copies), scenes.attributes, scenes.attributes >= 0)
    pair = scenes.attributes[:, 0] > 0
    return {
        "psnr": float((10 * torch.log10(4 / mse)).mean()),
        "exact": float(right.double().mean()),
        "exact_single": float(right[~pair].double().mean()),
        "exact_pair": float(right[pair].double().mean()),
    }


def watch(vae: nn.Module, judge: ShapesClassifier) -> str:
    """A line on 500 held-out scenes."""
    assert isinstance(vae, AutoencoderKL)
    return " ".join(f"{name} {value:.3f}" for name, value in reconstruction(vae, judge, 500, 99).items())


def finished(average: nn.Module, scenes: int = 2000) -> AutoencoderKL:
    """The autoencoder with its weights rounded to half precision and the measured scale of its latents."""
    vae = make_vae()
    vae.load_state_dict({name: value.half().float() for name, value in average.state_dict().items()})
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=round(1 / float(latents_of(vae, draw(scenes, 3).images).std()), 4))
    return vae
