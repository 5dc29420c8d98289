"""Distilling a fine-tune of your own: a base model, your LoRA, a file of prompts, and no images."""

from __future__ import annotations

from stepdistill.data import Prompts
from stepdistill.objectives import DMD2
from stepdistill.parts.gan import Gan
from stepdistill.recipe import Recipe, Teacher, Weights
from stepdistill.sampling import Ddim, Sampler, trailing
from stepdistill.trainer import AdamW, Run


def sd_own_finetune() -> Recipe:
    """A base and your LoRA into one step, from prompts alone; student and critic share the base's network."""
    return Recipe(
        teacher=Teacher("stable-diffusion-v1-5/stable-diffusion-v1-5", guidance=4.0),
        objective=DMD2(gan=Gan(weight=0.0), student_every=5),
        data=Prompts(file="prompts.txt"),
        optim={
            "student": AdamW(1e-4, betas=(0.0, 0.999)),
            "critic": AdamW(1e-4, betas=(0.0, 0.999)),
        },
        sampler=Sampler(trailing(1), Ddim()),
        run=Run(steps=10_000, batch=4, accumulate=4, ema=0.999, device="cuda", dtype="bfloat16"),
        student=Weights("lora", rank=64),
        critic=Weights("lora", rank=64),
    )
