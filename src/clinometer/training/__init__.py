"""From a configuration to a trained model: the loop, precision, checkpoints."""
