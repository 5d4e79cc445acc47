"""A quantised model against its full-precision parent."""
