"""Few-step sampling without waste: see ``optimize``, and ``optimize=True`` of ``stepdistill.sample``."""

from stepdistill.inference.few_step import FewStep, Plan, plan_of
from stepdistill.inference.optimized import Optimized, Parts, optimize, optimize_by

__all__ = ["FewStep", "Optimized", "Parts", "Plan", "optimize", "optimize_by", "plan_of"]
