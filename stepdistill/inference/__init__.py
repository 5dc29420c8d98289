"""Few-step sampling without waste: see ``optimize``, and ``optimize=True`` of ``stepdistill.sample``."""

from stepdistill.inference.few_step import FewStep, Plan, plan_of
from stepdistill.inference.optimize import Optimized, Parts, optimize

__all__ = ["FewStep", "Optimized", "Parts", "Plan", "optimize", "plan_of"]
