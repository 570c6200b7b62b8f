"""The instrument, always on: every gradient of every step, for almost nothing."""
