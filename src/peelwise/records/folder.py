"""Write an output folder whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peelwise.errors import OutputError


def check_free(folder: Path, *, force: bool, ours: str) -> None:
    """Refuse an output folder that exists, cannot be written, or, with ``force``, is not one of ours.

    Args:
        folder: where the result is to stand.
        force: whether an earlier result may be replaced.
        ours: a file whose presence shows that the folder is an earlier result.

    Raises:
        OutputError: Before any work is done.
    """
    if folder.is_file():
        raise OutputError(f"{folder} is a file: expected a folder to write to. Choose another --out.")
    if folder.is_dir() and any(folder.iterdir()):
        if not force:
            raise OutputError(f"{folder} exists and is not empty. Use --force to replace it, or another --out.")
        if not (folder / ours).is_file():
            raise OutputError(
                f"{folder} holds no {ours}, so it is not replaced even with --force. Choose another --out."
            )
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryDirectory(dir=existing if existing != folder.absolute() else folder.parent):
            pass
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}.") from error


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``; rename it into place when the context ends well.

    An earlier ``folder`` is replaced only then. If anything fails, it is left as it was.

    Raises:
        OutputError: If the disk is full, read-only, or the rename fails.
    """
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}.") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        _replace(temporary, folder)
    except OSError as error:
        raise OutputError(f"{folder} could not be completed: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(new: Path, folder: Path) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    try:
        folder.rename(old / "old")
        new.rename(folder)
    except BaseException:
        # An interrupt counts too. Where another writer was faster, its result stands.
        if (old / "old").exists() and not folder.exists():
            (old / "old").rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def write_text_file(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    try:
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error
