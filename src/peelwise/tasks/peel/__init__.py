"""Peel maps of transformers (arXiv:2605.02853): a stack of reference blocks fitted one after another."""
