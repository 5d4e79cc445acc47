"""A run history on the terminal."""
