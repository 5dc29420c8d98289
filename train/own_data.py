"""Methods that want real images, on data of your own: a folder, tar shards, or a Hugging Face data set.

Everything about the data is a field: ``stepdistill distill own_images --data.folder photos --data.on-bad skip
--data.buckets generated --data.cache /big/cache``. Encoded once, images and captions are read from the cache.
"""

from __future__ import annotations

from stepdistill.data import Captioned, Data, HubImages, WebShards
from stepdistill.objectives import LCM
from stepdistill.recipe import Recipe, Teacher, Weights
from stepdistill.sampling import Renoise, Sampler, trailing
from stepdistill.trainer import AdamW, Run


def _lcm_lora(data: Data) -> Recipe:
    return Recipe(
        teacher=Teacher("stable-diffusion-v1-5/stable-diffusion-v1-5", guidance=7.5),
        objective=LCM(target_decay=None),
        data=data,
        optim={"student": AdamW(1e-4, warmup=500)},
        sampler=Sampler(trailing(4), Renoise()),
        run=Run(steps=10_000, batch=8, accumulate=2, ema=0.999, device="cuda", dtype="bfloat16"),
        student=Weights("lora", rank=64),
    )


def own_images() -> Recipe:
    """LCM-LoRA of four steps on a folder of captioned images."""
    return _lcm_lora(Captioned("images", on_bad="skip"))


def own_shards() -> Recipe:
    """LCM-LoRA of four steps on WebDataset shards."""
    return _lcm_lora(WebShards("shards/{00000..00009}.tar", on_bad="skip"))


def own_hub() -> Recipe:
    """LCM-LoRA of four steps on a Hugging Face data set, streamed."""
    return _lcm_lora(HubImages("path/or/hub-id", streaming=True, on_bad="skip"))
