"""Reading run files: without writing, within bounds, while they are written."""
