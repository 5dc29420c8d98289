"""Regression onto the teacher's trajectories."""
