"""A model in a low-bit format, layer by layer, without training."""
