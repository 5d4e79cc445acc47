"""Check: which block is unlike the others, from signals over depth."""
