"""Where low-bit modules keep codes and scales: a file for each kind of module, and one table of them."""

from peelwise.model.weights.held import Held
from peelwise.model.weights.table import effective_weight, held, hold_

__all__ = ["Held", "effective_weight", "held", "hold_"]
