"""Attention inside diffusers' networks, of one network at a time: its backend, and fused norms and rotations."""

from stepdistill.attention.install import fused_qk, use_attention, with_processors

__all__ = ["fused_qk", "use_attention", "with_processors"]
