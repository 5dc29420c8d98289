"""K2: RMS norm and rotary embedding of queries and keys, written into one joint sequence."""

from stepdistill.kernels.qk_norm_rope.dispatch import Stream, qk_norm_rope

__all__ = ["Stream", "qk_norm_rope"]
