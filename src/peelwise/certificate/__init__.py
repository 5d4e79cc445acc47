"""Certificates: a record, its witness and its probe in one folder, written whole and rechecked against the model."""
