"""The audit: how much lower the loss could be, block by block, with weights that prove it."""
