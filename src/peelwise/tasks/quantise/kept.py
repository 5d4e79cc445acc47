"""The codes of finished blocks on disk, so that an interrupted run goes on where it ended."""

from __future__ import annotations

from collections.abc import Mapping

from peelwise.engine.kept import KeptFiles, encoded_of, parts_of
from peelwise.formats.base import Encoded
from peelwise.records.quantise import QuantisedLayer

Found = Mapping[str, tuple[Encoded, QuantisedLayer]]


class Kept(KeptFiles):
    """A file per finished block; see `KeptFiles`."""

    def get(self, block: int) -> dict[str, tuple[Encoded, QuantisedLayer]] | None:
        """Return what is kept of a block; ``None`` if there is nothing, or of another run, or damaged."""
        found = self.read(_name(block))
        if found is None:
            return None
        tensors, values = found
        try:
            lines = [QuantisedLayer.model_validate(each) for each in values]
            return {line.name: (encoded_of(tensors, line.name), line) for line in lines}
        except (ValueError, KeyError):
            return None

    def put(self, block: int, found: Found) -> None:
        """Keep the layers of a block, whole or not at all.

        Raises:
            OutputError: If the folder cannot be written.
        """
        tensors = dict(part for name, (encoded, _) in found.items() for part in parts_of(name, encoded))
        self.write(_name(block), tensors, [line.model_dump() for _, line in found.values()])


def _name(block: int) -> str:
    return f"block-{block:04d}"
