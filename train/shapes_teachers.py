"""Make the two text-to-image teachers of the shapes world, and their judges, from nothing.

    python train/shapes_teachers.py [--stages classifier vae clip sd sd3 gates]

About two hours on one CPU core; `sd` and `sd3` may run side by side. An interrupted stage goes on where it last saved
(`runs/shapes/`); remove that folder to start anew.

Attribute classifier, autoencoder (its loss looks through the classifier), open_clip with hard negatives (its text tower
is both teachers' text encoder), a T5 encoder for SD3, the denoisers on cached latents, then every figure of the
manifests, each with the bound that it must pass.

What the way there looked like. Reconstructions kept every attribute after 16 thousand images (25 dB), long before they
were sharp. The CLIP score's fall for a wrong shape was 10 points after 300 steps and 21 after 1000. The UNet drew all
that a full caption names in 50 % of 120 images after 32 thousand samples, 73 % after 64, 84 % after 96, 93 % after 160
and 97.5 % after 320; the transformer in 29 % after 32 thousand, 71 % after 128, 82 % after 192 and 92 % after 384. Two
shapes come last. On full captions four DDIM steps are about as good as fifty, two are worse, one is far off.

The bundled autoencoder's plan was shortened on the way, at a constant rate until step 2000; that aside, a rebuild takes
the same steps.
"""

from __future__ import annotations

from typing import Literal

import rich
import torch
import tyro
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from shapes_parts import assets, denoisers, gates, judges, text, vae
from shapes_parts.loop import RUNS
from transformers.utils import logging as transformers_logging

from stepdistill.checkpoint import write_atomically
from stepdistill.evaluation.shapes import ShapesClassifier, load_shapes_classifier

Stage = Literal["classifier", "vae", "clip", "sd", "sd3", "gates"]
STAGES: tuple[Stage, ...] = ("classifier", "vae", "clip", "sd", "sd3", "gates")


def classifier_stage() -> None:
    """Train the attribute classifier and write it."""
    trained = judges.train_classifier()
    path = assets.JUDGES / "classifier.safetensors"
    write_atomically(path, lambda p: save_file(assets.halves(trained.average), p, metadata={"format": "pt"}))


def vae_stage() -> None:
    """Train the autoencoder, then its decoder alone; both teachers' folders get it with their denoiser."""
    whole = vae.finished(vae.train_vae(judge()).average)
    vae.finished(vae.train_decoder(whole, judge()).average).save_pretrained(RUNS / "vae")


def clip_stage() -> None:
    """Train open_clip and the T5 encoder; write the judge, keep the encoders' weights."""
    text.save_clip(judges.trained_clip(), assets.JUDGES / "clip")
    text.train_t5()


def sd_stage() -> None:
    """Train the UNet and write its pipeline."""
    encoder = text.text_encoder(judges.trained_clip(), projected=False)
    autoencoder = trained_vae()
    data = denoisers.encode_scenes(autoencoder)
    unet = assets.rounded(denoisers.train_sd(data, encoder, autoencoder, judge()).average)
    assets.save_pipeline(denoisers.sd_pipeline(unet, encoder, autoencoder), assets.SD_FOLDER)


def sd3_stage() -> None:
    """Train the SD3 transformer and write its pipeline."""
    encoder = text.text_encoder(judges.trained_clip(), projected=True)
    t5, autoencoder = assets.rounded(text.train_t5().average).t5, trained_vae()
    data = denoisers.encode_scenes(autoencoder)
    transformer = assets.rounded(denoisers.train_sd3(data, encoder, t5, autoencoder, judge()).average)
    pipe = denoisers.sd3_pipeline(transformer, encoder, t5, autoencoder)
    pipe.register_to_config(_max_sequence_length=text.T5_LENGTH)  # an argument of the call; "_" keys pass unnoticed
    assets.save_pipeline(pipe, assets.SD3_FOLDER)


def gates_stage() -> None:
    """Measure everything on the written files; write the manifests; fail if a figure is below its bound."""
    rich.print(gates.measure_and_record())


def judge() -> ShapesClassifier:
    """The written classifier."""
    return load_shapes_classifier(assets.JUDGES / "classifier.safetensors")


def trained_vae() -> AutoencoderKL:
    """What ``vae_stage`` kept."""
    return AutoencoderKL.from_pretrained(RUNS / "vae").eval().requires_grad_(False)


def main(stages: tuple[Stage, ...] = STAGES, threads: int = 1) -> None:
    """Run stages in the order given.

    Args:
        stages: which; a stage needs those before it, but for sd3, which does not need sd.
        threads: of torch; on networks this small two processes of one thread do more than one of two.
    """
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    RUNS.mkdir(parents=True, exist_ok=True)
    run = {
        "classifier": classifier_stage,
        "vae": vae_stage,
        "clip": clip_stage,
        "sd": sd_stage,
        "sd3": sd3_stage,
        "gates": gates_stage,
    }
    for stage in stages:
        print(f"== {stage}", flush=True)
        run[stage]()


if __name__ == "__main__":
    tyro.cli(main)
