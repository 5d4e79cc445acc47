"""A plan on the terminal, and in one sentence."""
