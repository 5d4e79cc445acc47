"""Codes, predictions and measured damages of finished blocks on disk, so that an interrupted plan goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peelwise.engine.kept import KeptFiles, encoded_of, parts_of
from peelwise.formats.base import Format
from peelwise.model.layers import Block
from peelwise.tasks.allocate.groups import Group, Member


class Kept(KeptFiles):
    """Two files per finished block: its groups, and what it costs in each format; see `KeptFiles`."""

    def groups(self, block: Block, forms: Sequence[Format]) -> list[Group] | None:
        """Return the groups of a block; ``None`` if there are none, or of another run, or damaged."""
        found = self.read(f"block-{block.index:04d}")
        if found is None:
            return None
        tensors, values = found
        linears = {linear.name: linear for linear in block.linears}
        try:
            groups = [
                Group(
                    block.index,
                    [
                        Member(
                            linears[each["name"]],
                            each["tokens"],
                            [encoded_of(tensors, f"{each['name']}:{form.name}") for form in forms],
                            each["predicted"],
                            each["bits"],
                        )
                        for each in members
                    ],
                )
                for members in values
            ]
        except (KeyError, TypeError):
            return None
        return groups

    def keep_groups(self, block: int, groups: Sequence[Group], forms: Sequence[Format]) -> None:
        """Keep the groups of a block, whole or not at all."""
        members = [member for group in groups for member in group.members]
        tensors = dict(
            part
            for member in members
            for form, encoded in zip(forms, member.codes, strict=True)
            for part in parts_of(f"{member.linear.name}:{form.name}", encoded)
        )
        values = [
            [
                {"name": m.linear.name, "tokens": m.tokens, "predicted": m.predicted, "bits": m.bits}
                for m in group.members
            ]
            for group in groups
        ]
        self.write(f"block-{block:04d}", tensors, values)

    def damages(self, block: int) -> dict[int, float] | None:
        """Return what a block costs in each format by its number; ``None`` if it is not known."""
        found = self.read(f"damage-{block:04d}")
        return None if found is None else {int(at): float(cost) for at, cost in found[1].items()}

    def keep_damages(self, block: int, damages: Mapping[int, float]) -> None:
        """Keep what a block costs in each format."""
        self.write(f"damage-{block:04d}", {}, {str(at): cost for at, cost in damages.items()})
