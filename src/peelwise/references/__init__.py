"""Pure mathematics: one file per kind of reference that a layer is compared with."""

from peelwise.references.quantized import ErrorParts, QuantizedReference, quadratic, solve, split

__all__ = ["ErrorParts", "QuantizedReference", "quadratic", "solve", "split"]
