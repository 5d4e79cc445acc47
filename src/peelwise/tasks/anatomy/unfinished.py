"""What an anatomy has finished, kept on disk piece by piece, so that one that was killed goes on where it stopped."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peelwise.errors import OutputError
from peelwise.records.anatomy import BlockAnatomy, Predictability
from peelwise.records.folder import write_text_file
from peelwise.records.options import Plain

FOUND, TRAINING = "found.json", "training.pt"


@dataclass
class Unfinished:
    """Finished pieces of an anatomy: fields per block, and what is of all blocks together.

    Attributes:
        folder: where they are kept; ``None`` to keep them in memory alone.
        about: what they are pieces of; those of anything else must not be mixed with them.
        blocks: per block the fields of `BlockAnatomy` that are finished.
        predictability: finished kinds of matrix.
        resumed: whether some were there at the beginning.
    """

    folder: Path | None
    about: Plain
    blocks: list[dict[str, Any]]
    predictability: list[Predictability] = field(default_factory=list)
    resumed: bool = False

    @classmethod
    def opened(cls, folder: Path | None, about: Plain, blocks: int, *, force: bool = False) -> Unfinished:
        """Return the pieces in a folder, none if it is not there.

        Args:
            folder: see above.
            about: see above.
            blocks: how many the model has.
            force: begin anew where the folder holds pieces of something else.

        Raises:
            OutputError: If it does, or it cannot be read.
        """
        empty = cls(folder, about, [{} for _ in range(blocks)])
        if folder is None or not (folder / FOUND).is_file():
            return empty
        try:
            found = json.loads((folder / FOUND).read_text(encoding="utf-8"))
            known = found["about"]
            pieces = [BlockAnatomy.model_validate(each) for each in found["blocks"]]
            predictability = [Predictability.model_validate(each) for each in found["predictability"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{folder / FOUND} cannot be read ({error}). Delete {folder} to begin anew.") from error
        if known != about or len(pieces) != blocks:
            if force:
                shutil.rmtree(folder)
                return empty
            others = ", ".join(sorted(key for key in {*known, *about} if known.get(key) != about.get(key)))
            raise OutputError(
                f"{folder} holds an unfinished anatomy of something else ({others} differ). Use --force to begin anew, "
                "or another --out."
            )
        fields = [{name: getattr(p, name) for name in p.model_fields_set - {"index", "name"}} for p in pieces]
        return cls(folder, about, fields, predictability, resumed=any(fields) or bool(predictability))

    def add(self, index: int, **fields: Any) -> None:
        """Keep finished fields of a block."""
        self.blocks[index] |= fields
        self.write()

    def write(self) -> None:
        """Write all pieces down, whole or not at all.

        Raises:
            OutputError: If they cannot be written.
        """
        if self.folder is None:
            return
        pieces = [BlockAnatomy(index=i, name="", **fields) for i, fields in enumerate(self.blocks)]
        found = {
            "about": self.about,
            "blocks": [each.model_dump(mode="json", by_alias=True, exclude_unset=True) for each in pieces],
            "predictability": [each.model_dump(mode="json", by_alias=True) for each in self.predictability],
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be written: {error.strerror or error}.") from error
        write_text_file(self.folder / FOUND, json.dumps(found) + "\n")

    def training(self, index: int) -> TrainingMemory:
        """Return where the state of the training of a block is kept."""
        return TrainingMemory(self.folder / TRAINING if self.folder is not None else None, index)


@dataclass(frozen=True)
class TrainingMemory:
    """The state of the training of one block, in a file of its own; nothing without one."""

    file: Path | None
    block: int

    def load(self) -> dict[str, Any] | None:
        """Return the state that was kept of this block, or ``None``."""
        if self.file is None or not self.file.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self.file, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            return None  # that training begins anew
        return state if state.get("block") == self.block else None

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep a state in the place of the last, whole or not at all.

        Raises:
            OutputError: If it cannot be written.
        """
        if self.file is None:
            return
        temporary = self.file.with_name(f".{self.file.name}.new")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(dict(state), temporary)
            temporary.replace(self.file)
        except OSError as error:
            raise OutputError(f"{self.file} cannot be written: {error.strerror or error}.") from error
