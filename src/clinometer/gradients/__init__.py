"""The instrument, asked: why a gradient is missing, whether it is right, who pushed a weight."""
