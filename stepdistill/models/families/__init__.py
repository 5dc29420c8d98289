"""What a model family knows: one small file each, one row in the table; nothing else differs by family."""

from __future__ import annotations

from stepdistill.models.families import (
    animatediff,
    cogvideox,
    dit,
    edm,
    flux,
    flux2,
    lumina2,
    pixart,
    qwen_image,
    sana,
    sd,
    sd3,
    sdxl,
    unet2d,
    wan,
    z_image,
)
from stepdistill.models.families.base import (
    Family,
    Opened,
    Size,
    Tap,
    family_for,
    family_of,
    open_pipeline,
)
from stepdistill.models.families.loading import load_pipeline

__all__ = [
    "Family",
    "Opened",
    "Size",
    "Tap",
    "animatediff",
    "cogvideox",
    "dit",
    "edm",
    "family_for",
    "family_of",
    "flux",
    "flux2",
    "load_pipeline",
    "lumina2",
    "open_pipeline",
    "pixart",
    "qwen_image",
    "sana",
    "sd",
    "sd3",
    "sdxl",
    "unet2d",
    "wan",
    "z_image",
]
