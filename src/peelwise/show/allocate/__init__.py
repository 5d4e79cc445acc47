"""An allocation of bits, on the terminal and in the syntax of the tools that will use it."""
