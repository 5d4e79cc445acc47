"""What is made from files alone: a certificate's page, and a run history in other programs' formats. No torch."""

from __future__ import annotations

from pathlib import Path

from peelwise.errors import StoreError
from peelwise.records.files import check_unchanged, read_any_record
from peelwise.records.folder import check_free, write_text_file, written_whole
from peelwise.show.views import render_html
from peelwise.store.export import MANIFEST, export
from peelwise.store.reader import RunReader


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Render the HTML report of a certificate again.

    Args:
        folder: the certificate.
        out: the page; default: ``report.html`` in ``folder``.

    Returns:
        Where it was written.

    Raises:
        CertificateError: If the folder is no readable certificate, or was changed after it was written.
        OutputError: If the page cannot be written.
    """
    path = Path(folder) / "report.html" if out is None else Path(out)
    record = read_any_record(Path(folder))
    check_unchanged(Path(folder), record)
    write_text_file(path, render_html(record))
    return path


def export_history(
    history: str | Path, to: str, out: str | Path, *, run: int | None = None, force: bool = False
) -> list[str]:
    """Export a run history, which may still be being written, for other programs.

    Args:
        history: the file.
        to: ``"csv"``, ``"jsonl"``, ``"parquet"`` or ``"tensorboard"``.
        out: folder for the files, one per table.
        run: number of one run; default: all of them.
        force: replace an earlier export.

    Returns:
        The names of the files, sorted.

    Raises:
        StoreError: If the history cannot be read or holds no run.
        OptionError: If the format is not known.
        OutputError: If ``out`` is taken or cannot be written.
    """
    with RunReader(Path(history)) as reader:
        runs = reader.runs() if run is None else [reader.run(run)]
        if not runs:
            raise StoreError(f"{history} holds no run yet.")
        check_free(Path(out), force=force, ours=MANIFEST)
        with written_whole(Path(out)) as folder:
            export(reader, runs, to, folder)
    return sorted(file.name for file in Path(out).iterdir())
