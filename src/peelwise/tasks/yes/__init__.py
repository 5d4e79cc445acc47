"""YES bounds of feed-forward networks (arXiv:2410.10984), from samples to rows."""
