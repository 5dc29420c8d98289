"""What a model family knows: one small file each, one row in the table; nothing else differs by family."""

from __future__ import annotations

from stepdistill.models.families import sd, sd3, unet2d
from stepdistill.models.families.base import Family, Opened, Size, Tap, family_for, family_of, open_pipeline

__all__ = ["Family", "Opened", "Size", "Tap", "family_for", "family_of", "open_pipeline", "sd", "sd3", "unet2d"]
