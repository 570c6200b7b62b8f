"""What torch's own calls report: clipping, unscaling, losses, zero_grad."""
