"""An anatomy, as people see it: terminal, page, words."""
