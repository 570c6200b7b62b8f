"""The statistics of one step, of every tensor."""
