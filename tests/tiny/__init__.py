"""Tiny pipelines of diffusers' and transformers' real classes, one file per family, each with a ``pipeline()``."""
