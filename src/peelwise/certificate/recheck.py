"""The numbers of a certificate beside those that are found again, whatever was measured."""

from __future__ import annotations

from torch import Tensor

from peelwise.certificate.base import Check
from peelwise.engine.session import ReportSession
from peelwise.errors import CertificateError
from peelwise.evidence.intervals import Paired
from peelwise.records.base import Interval


def check_finite(name: str, *losses: Tensor) -> None:
    """Refuse losses that are no numbers: nothing follows from them.

    Raises:
        CertificateError: If there are any.
    """
    if not all(bool(each.isfinite().all()) for each in losses):
        raise CertificateError(f"{name}: with this witness the model's loss is no finite number.")


class Recheck:
    """Compares recorded numbers with those found on report, and keeps every comparison.

    Args:
        session: the model as it stands, on the certificate's report part.
        tolerance: nats per token that a number may be off.
    """

    def __init__(self, session: ReportSession, tolerance: float) -> None:
        self.session, self.tolerance = session, tolerance
        self.checks: list[Check] = []

    def loss(self, name: str, recorded: float, found: Tensor) -> None:
        """Compare a loss in nats per token with losses ``[sequences]``."""
        check_finite(name, found)
        self.compare(name, recorded, self.session.report.mean_of(found))

    def gain(self, name: str, recorded: Interval | None, before: Tensor, after: Tensor) -> Paired:
        """Compare mean and ends of a recorded gain with those from ``before`` to ``after``, and return the latter."""
        check_finite(name, before, after)
        found = self.session.gain(before, after)
        if recorded is not None:
            self.interval(name, recorded, found.interval())
        return found

    def interval(self, name: str, recorded: Interval, found: Interval) -> None:
        """Compare mean and ends of an interval."""
        for part in ("mean", "low", "high"):
            self.compare(f"{name}.{part}", getattr(recorded, part), getattr(found, part))

    def compare(self, name: str, recorded: float, found: float) -> None:
        """Compare one number."""
        self.checks.append(Check(name, recorded, found, abs(recorded - found) <= self.tolerance))

    def wrong_number(self) -> str | None:
        """Return which number was not found again, or ``None``."""
        failed = next((c for c in self.checks if not c.holds), None)
        if failed is None:
            return None
        return f"{failed.name}: {failed.recorded:.6f} was certified, {failed.found:.6f} was found."
