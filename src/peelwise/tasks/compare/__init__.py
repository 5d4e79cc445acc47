"""Two models of one architecture: which part's change hurt, which helped, and what kind of change it is."""
