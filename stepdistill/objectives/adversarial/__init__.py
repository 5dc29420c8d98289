"""Adversarial distillation."""
