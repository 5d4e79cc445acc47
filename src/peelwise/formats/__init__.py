"""Feasible sets of weights: what a low-bit layer may hold, how it is written, and what it costs. Pure tensors."""
