"""Signals of every block against depth: from the weights, from one pass forward, from one pass backward."""
