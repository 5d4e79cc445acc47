"""A comparison of a quantised model with its parent on the terminal."""
