"""Anatomy: how much each block matters, how far it can be bent, and what other blocks tell of it."""
