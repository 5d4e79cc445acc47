"""The arrows of the design, each a function call: audit, certificate."""
