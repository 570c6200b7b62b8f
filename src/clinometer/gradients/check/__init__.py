"""Whether a gradient is right: from the whole model down to the entry."""
