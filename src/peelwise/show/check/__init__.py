"""A check as people see it: in sentences, on the terminal, as a page."""
