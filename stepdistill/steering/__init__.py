"""Training-free methods at inference."""

from stepdistill.steering.negative import Steered, negative

__all__ = ["Steered", "negative"]
