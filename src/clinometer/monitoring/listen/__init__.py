"""What torch's own calls tell: clipping, unscaling, losses, zero_grad."""
