"""The run history: one SQLite file with one writer and any number of live readers. Its only owner; no torch.

The file is in write-ahead mode, so readers never wait for the writer nor it for them. Everything one probe found
is one transaction: whatever happens to the writer, a reader sees whole records only. The tables are documented in
docs/run-history.md for readers with plain SQL.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peelwise.store.reader import RunReader
    from peelwise.store.writer import RunWriter

__all__ = ["RunReader", "RunWriter"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: the process that writes a history starts with every training and needs neither.
    if name == "RunReader":
        from peelwise.store.reader import RunReader

        return RunReader
    if name == "RunWriter":
        from peelwise.store.writer import RunWriter

        return RunWriter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
