"""Which layers of a model get how many bits, under a budget."""
