"""Numeric derivatives that can be trusted: differences, float64, and what is held constant."""
