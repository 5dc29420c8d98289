"""Consistency along the teacher's trajectories."""
