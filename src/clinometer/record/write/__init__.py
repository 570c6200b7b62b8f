"""Writing run files: each step is committed before the call returns."""
