"""The optimizers, learning-rate schedules and gradient clipping."""
