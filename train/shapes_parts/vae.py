"""Training of the autoencoder: an AutoencoderKL of four latent channels, each latent cell 4x4 pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from shapes_parts.judges import Stream, scaled, spoiled
from shapes_parts.loop import Plan, Trained, train
from torch import Tensor, nn

from stepdistill.evaluation.shapes import ShapesClassifier
from stepdistill.shapes import align, draw

VAE = Plan("vae", steps=9000, lr=2e-3, ema=0.995, decay=0.4)
DECODER = Plan("decoder", steps=3000, lr=1e-3, ema=0.995, decay=0.5)
BATCH = 16
LATENT_NOISE = 0.03  # of a standard deviation near 1: what a denoiser will surely get wrong
KL = 2e-5
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
    for stage, (real, copy) in enumerate(zip(judge.layers(images), judge.layers(copies), strict=True)):
        if stage in STAGES:
            total = total + F.mse_loss(copy, real) / real.square().mean()
    return total


def train_vae(judge: ShapesClassifier) -> Trained:
    """Absolute error, the judge's activations and a weak KL term, on fresh scenes."""
    stream = Stream(BATCH, seed=2_000_000)

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(model, AutoencoderKL)
        images = scaled(stream(step).images)
        posterior = model.encode(images).latent_dist
        copies = model.decode(posterior.sample(generator)).sample
        return _terms(judge, images, copies) | {"kl": posterior.kl().mean()}

    def weighted(model: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        terms = loss(model, step, generator)
        total = terms["l1"] + PERCEPTUAL * terms["seen"] + KL * terms["kl"]
        return {"loss": total, **terms}

    return train(VAE, make_vae, weighted, lambda average: watch(average, judge), watch_every=1000)


def _terms(judge: ShapesClassifier, images: Tensor, copies: Tensor) -> dict[str, Tensor]:
    return {
        "l1": F.l1_loss(copies, images) + F.mse_loss(copies, images),
        "seen": perceptual(judge, images, copies),
        "mse": F.mse_loss(copies, images),
    }


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
