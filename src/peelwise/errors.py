"""Every error and warning that peelwise raises on purpose, in one tree.

A message says what went wrong, what was expected, what was found and what to do, in one or two lines.
"""


class PeelwiseError(Exception):
    """Base of all errors that a user can act on; the command line prints it and exits with code 2."""


class ModelError(PeelwiseError):
    """The model cannot be opened or holds values that cannot be audited (missing, corrupt, NaN)."""


class UnsupportedModelError(ModelError):
    """The model was opened, but its architecture is not one that peelwise can audit."""


class NotCausalError(UnsupportedModelError):
    """A model's logits move with tokens that come later."""


class NotDifferentiableError(UnsupportedModelError):
    """The model runs, but hides its inner results from gradients (packed weights, reentrant checkpointing)."""


class ProbeError(PeelwiseError):
    """The text or tokens given cannot serve as a probe (empty, too short, wrong vocabulary)."""


class OutputError(PeelwiseError):
    """The output folder exists, cannot be written, or could not be completed."""


class CertificateError(PeelwiseError):
    """A certificate folder is missing, incomplete, or of a schema this version does not know."""


class StoreError(PeelwiseError):
    """A run history cannot be written or read: another writer, a full disk, a newer or foreign file."""


class DeviceError(PeelwiseError):
    """The device or dtype asked for is not available on this machine."""


class MissingExtraError(PeelwiseError):
    """An optional dependency is needed and not installed; the message carries the install command."""

    def __init__(self, what: str, extra: str, further: str = "") -> None:
        command = f'pip install "peelwise[{extra}]"' + (f" && pip install {further}" if further else "")
        super().__init__(f"{what} needs an optional dependency. Run: {command}")


class OtherProcessError(PeelwiseError):
    """Another one of the processes that work together failed; ``foreseen`` tells whether it knows the reason.

    Args:
        rank: which one; ``None`` where it has ended and it is not known which.
        reason: in its words, or in ours.
        foreseen: whether it is an error of ours.
    """

    def __init__(self, rank: int | None, reason: str, foreseen: bool) -> None:
        super().__init__(
            f"Another process has ended ({reason})." if rank is None else f"Process {rank} failed: {reason}"
        )
        self.foreseen = foreseen


class TooFewSamplesError(PeelwiseError):
    """A statistic was asked for on fewer samples than it needs."""


class OptionError(PeelwiseError, ValueError):
    """An option has a value that is not allowed, or that does not go with the others."""


class FormatError(PeelwiseError, ValueError):
    """A weight format is unknown, misspelt, or does not go with the matrix or module that it is to hold."""


class MapError(PeelwiseError, ValueError):
    """A station map has the wrong length, decreases, or points backwards."""


class PeelwiseWarning(UserWarning):
    """Base of all warnings; the result stays valid."""


class IllConditionedWarning(PeelwiseWarning):
    """A matrix was rank deficient or badly conditioned, and more damping than asked for was used.

    Args:
        text: what is said.
        code: of a remark in a record, see `peelwise.records.codes`.
        values: the numbers and names in the text.
    """

    def __init__(self, text: str, code: str = "", **values: int | float | str) -> None:
        super().__init__(text)
        self.code, self.values = code, values


class FewSequencesWarning(PeelwiseWarning):
    """A split holds so few sequences that intervals will be wide."""
