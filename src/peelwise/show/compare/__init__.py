"""A comparison of two models: words, terminal and page."""
