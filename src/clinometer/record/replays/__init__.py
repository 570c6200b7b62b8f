"""Replayed steps that `clinometer explain` left in a run folder, read."""
