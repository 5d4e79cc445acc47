"""Lines and better codes of finished blocks on disk, so that an interrupted comparison goes on where it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from peelwise.engine.kept import KeptFiles, encoded_of, parts_of
from peelwise.formats.base import Encoded
from peelwise.records.quantcheck import LayerCheck


@dataclass
class BlockAlone:
    """What was found of the layers of a block, each by itself; all by the names of layers.

    Attributes:
        lines: of the record.
        codes: better ones, or those in use where none were found; none of layers that were not looked at.
        tokens: of fit that each layer is given.
        complete: whether the budget lasted.
    """

    lines: list[LayerCheck] = field(default_factory=list)
    codes: dict[str, Encoded] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    complete: bool = True


class Kept(KeptFiles):
    """Two files per finished block: its layers by themselves, and in running order; see `KeptFiles`."""

    def alone(self, block: int) -> BlockAlone | None:
        """Return what was found of a block's layers; ``None`` if it is not known."""
        found = self.read(f"block-{block:04d}")
        if found is None:
            return None
        tensors, said = found
        try:
            lines = [LayerCheck.model_validate(each) for each in said["lines"]]
            codes = {name: encoded_of(tensors, name) for name in said["codes"]}
            return BlockAlone(lines, codes, dict(said["tokens"]))
        except (ValueError, KeyError, TypeError):
            return None

    def keep_alone(self, block: int, found: BlockAlone) -> None:
        """Keep what was found of a block's layers, whole or not at all."""
        lines = [line.model_dump() for line in found.lines]
        said = {"lines": lines, "codes": list(found.codes), "tokens": found.tokens}
        self.write(f"block-{block:04d}", _tensors(found.codes), said)

    def in_order(self, block: int) -> dict[str, Encoded] | None:
        """Return the codes of a block's layers in running order; ``None`` if they are not known."""
        found = self.read(f"order-{block:04d}")
        try:
            return None if found is None else {name: encoded_of(found[0], name) for name in found[1]}
        except (KeyError, TypeError):
            return None

    def keep_in_order(self, block: int, codes: Mapping[str, Encoded]) -> None:
        """Keep the codes of a block's layers in running order, whole or not at all."""
        self.write(f"order-{block:04d}", _tensors(codes), list(codes))


def _tensors(codes: Mapping[str, Encoded]) -> dict[str, Tensor]:
    return dict(part for name, encoded in codes.items() for part in parts_of(name, encoded))
