"""What a check, an audit and the others take, as formulas in the sizes of a model: no model, no torch."""
