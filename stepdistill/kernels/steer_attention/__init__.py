"""K1: attention over several key/value branches that share their queries."""

from stepdistill.kernels.steer_attention.dispatch import branch_attention, steer_attention

__all__ = ["branch_attention", "steer_attention"]
