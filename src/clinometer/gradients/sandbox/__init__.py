"""Runs a closure and leaves no trace: everything is afterwards bit for bit what it was."""
