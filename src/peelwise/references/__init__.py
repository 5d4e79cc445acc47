"""Pure mathematics: one file per kind of reference that a layer is compared with."""
