"""The checkpoints of one run, each compared with the one before it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from peelwise.engine.clock import Watcher
from peelwise.errors import ModelError
from peelwise.model.checkpoint_files import check_folder, check_weights
from peelwise.probe.probe import Probe
from peelwise.records.compare import CompareSeries
from peelwise.tasks.compare.run import Candidate, run_compare
from peelwise.tasks.compare.settings import CompareSettings


def checkpoint_folders(folder: Path, *, allow_pickle: bool = False) -> list[Path]:
    """Return the checkpoints in a folder in the order of the numbers in their names, such as ``step-00400``.

    Those without a number, such as ``final``, come last. The files of all are checked (sizes and headers, no weights),
    so that one that was written by half ends nothing after an hour.

    Args:
        folder: holds them.
        allow_pickle: whether ``.bin`` weights will do.

    Raises:
        ModelError: If there are fewer than two, or one of them is damaged.
    """
    found = [path for path in folder.iterdir() if (path / "config.json").is_file()] if folder.is_dir() else []
    if len(found) < 2:
        raise ModelError(
            f"{folder} holds {len(found)} checkpoints (folders with a config.json), expected at least 2. Name OLD and "
            "NEW, or the folder of a run."
        )
    for path in found:
        check_folder(path)
        check_weights(path, allow_pickle=allow_pickle)
    return sorted(found, key=_place)


def _place(path: Path) -> tuple[bool, list[int], str]:
    numbers = [int(n) for n in re.findall(r"\d+", path.name)]
    return not numbers, numbers, path.name


def run_series(
    folders: Sequence[Path],
    opened: Callable[[Path], Candidate],
    probe: Probe,
    settings: CompareSettings,
    watcher: Watcher | None = None,
) -> CompareSeries:
    """Compare each checkpoint with the one before it; two models are in memory at a time.

    Args:
        folders: in the order of training.
        opened: opens one.
        probe: the text, the same for all.
        settings: the budget is shared by the pairs.
        watcher: told about progress.
    """
    count = len(folders) - 1
    each = replace(settings, budget=settings.budget_seconds / count)
    pairs, earlier = [], opened(folders[0])
    for folder in folders[1:]:
        later = opened(folder)
        pairs.append(run_compare(earlier, later, probe, each, watcher))
        if any(note.code == "stopped" for note in pairs[-1].notes if not isinstance(note, str)):
            break
        earlier = later
    complete = len(pairs) == count and all(one.complete for one in pairs)
    return CompareSeries(complete=complete, pairs=tuple(pairs))
