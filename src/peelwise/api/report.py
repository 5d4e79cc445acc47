"""What the functions of the library return: a record to print, save and show, with the tensors that prove it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peelwise.certificate.base import write_certificate
from peelwise.errors import MissingExtraError
from peelwise.probe.probe import Probe
from peelwise.records.allocation import AllocationRecord
from peelwise.records.anatomy import AnatomyRecord
from peelwise.records.audit import AuditRecord
from peelwise.records.check import CheckRecord
from peelwise.records.compare import CompareRecord, CompareSeries
from peelwise.records.files import RECORD_FILE
from peelwise.records.folder import check_free
from peelwise.records.peel import PeelRecord
from peelwise.records.plan import PlanRecord
from peelwise.records.quantcheck import QuantcheckRecord
from peelwise.records.quantise import QuantiseRecord

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console, ConsoleOptions, RenderResult
    from torch import Tensor


REPORT_FILE = "report.html"


@dataclass(frozen=True, eq=False)
class Result:
    """A record that prints itself, in a terminal and in a notebook; the parent of all reports.

    Attributes:
        record: every number, as in the JSON file.
    """

    record: (
        AuditRecord
        | CheckRecord
        | PeelRecord
        | QuantcheckRecord
        | QuantiseRecord
        | CompareRecord
        | CompareSeries
        | AllocationRecord
        | AnatomyRecord
        | PlanRecord
    )

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from peelwise.show.views import render

        yield render(self.record)

    @property
    def conclusion(self) -> str:
        """What was found, in a few sentences that follow from the record's numbers."""
        from peelwise.show.views import conclusion

        return conclusion(self.record)

    def _repr_html_(self) -> str:
        from peelwise.show.notebook import record_html

        return record_html(self.record)

    def to_json(self) -> str:
        """Return the record as JSON text."""
        return self.record.to_json()


@dataclass(frozen=True, eq=False)
class WithPage(Result):
    """A record with a page.

    Attributes:
        record: every number, as in the JSON file.
    """

    record: AuditRecord | CheckRecord | PeelRecord | CompareRecord | CompareSeries | AnatomyRecord

    def to_html(self) -> str:
        """Return the report as one self-contained HTML page.

        Raises:
            MissingExtraError: Without matplotlib, which draws the pages of some records.
        """
        from peelwise.show.views import render_html

        return render_html(self.record)


@dataclass(frozen=True, eq=False)
class Certified(WithPage):
    """A record that is saved as a certificate, with its probe and the tensors that prove it.

    Attributes:
        record: every number, as in ``certificate.json``.
    """

    record: AuditRecord | CheckRecord | PeelRecord | CompareRecord

    def _proof(self) -> tuple[dict[str, Tensor], Probe | None]:
        """Return the tensors of the witness file by name, and the probe."""
        raise NotImplementedError

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write certificate, witness, probe and (with matplotlib) the HTML report; whole or not at all.

        Args:
            folder: must not exist or be empty, unless ``force``.
            force: replace an earlier result.

        Raises:
            OutputError: If the folder is taken or cannot be written.
        """
        path, (witness, probe) = check_out(folder, force=force), self._proof()
        write_certificate(path, self.record, witness, probe, _pages)
        return path


@dataclass(frozen=True, eq=False)
class Report(Certified):
    """A record, the tensors that prove it and the probe; the parent of what `audit` and `peel` return.

    Attributes:
        record: every number, as in ``certificate.json``.
        witness: replacement tensors by name.
        probe: the token sequences that were used.
    """

    record: AuditRecord | PeelRecord
    witness: dict[str, Tensor] = field(repr=False)
    probe: Probe = field(repr=False)

    def _proof(self) -> tuple[dict[str, Tensor], Probe | None]:
        return self.witness, self.probe


def check_out(folder: str | Path, *, force: bool) -> Path:
    """Refuse a folder that a report could not be saved in, before the work.

    Raises:
        OutputError: If it is taken or cannot be written.
    """
    path = Path(folder)
    check_free(path, force=force, ours=RECORD_FILE)
    return path


def frame(rows: list[dict[str, Any]], index: str) -> pd.DataFrame:
    """Return rows as a pandas data frame.

    Raises:
        MissingExtraError: Without pandas.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingExtraError("A data frame", "frame") from error
    return pd.DataFrame(rows).set_index(index)


def _pages(record: AuditRecord | CheckRecord | PeelRecord | CompareRecord) -> dict[str, str]:
    """Return the files that show the record; none without matplotlib."""
    from peelwise.show.views import render_html

    try:
        return {REPORT_FILE: render_html(record)}
    except MissingExtraError:
        return {}
