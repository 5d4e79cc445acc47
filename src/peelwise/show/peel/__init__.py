"""A peel on the terminal and as a page."""
