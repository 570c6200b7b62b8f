"""diagnose(): why a gradient is None, zero, partly zero or not finite, and on which line."""
