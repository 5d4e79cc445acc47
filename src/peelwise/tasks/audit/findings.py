"""What an audit has found so far. Every field is replaced whole, so that it is valid whenever work stops."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from peelwise.engine.depth.look import Look
from peelwise.engine.refine import Proposals, Refined
from peelwise.engine.session import Changes
from peelwise.evidence.intervals import Paired
from peelwise.records.audit import HeadRecord
from peelwise.records.base import Note


@dataclass
class Control:
    """A null control: the loss on report it ends at, and its own gain there."""

    loss: float
    gain: Paired
    start: float | None = None


@dataclass
class Findings:
    """Filled stage by stage.

    Attributes:
        factors: factors on blocks unlike their neighbours, where any helped: what all rounds begin with.
        proposals: of the first sweep, linearised at the model with these factors.
        shuffled_proposals: of the same sweep, made for permuted targets; ``None`` where the control is not run or done.
        composed: all blocks refined together, evaluated on report.
        removed: per block, report losses ``[sequences]`` of the model as it stands with the block skipped.
        without: per block, report losses ``[sequences]`` of the composed witness without that block.
        alone: per block, the block refined by itself, evaluated on report.
        screened: per block that was not refined, its direction at the largest step that may be its own.
        first_order: per block of ``screened``, what that gains to first order on report, nats ``[sequences]``.
        dense_composed, dense_alone: the same for a low-bit model without its formats: what the bits are compared with.
        look: signals over depth, and which blocks are unlike their neighbours.
        head, head_gain, shuffled, untrained: the head's reference and the null controls.
        without_blocks: report loss of a new head on the embedding, nats per token.
        notes: what a reader should know besides the numbers.
        complete: whether every planned stage ran to its end.
    """

    factors: Refined | None = None
    proposals: Proposals = field(default_factory=dict)
    shuffled_proposals: Proposals | None = None
    composed: Refined | None = None
    removed: dict[int, Tensor] = field(default_factory=dict)
    without: dict[int, Tensor] = field(default_factory=dict)
    alone: dict[int, Refined] = field(default_factory=dict)
    screened: dict[int, Changes] = field(default_factory=dict)
    first_order: dict[int, Tensor] = field(default_factory=dict)
    dense_composed: Refined | None = None
    dense_alone: dict[int, Refined] = field(default_factory=dict)
    head: HeadRecord | None = None
    head_control: Control | None = None
    shuffled: Control | None = None
    untrained: Control | None = None
    look: Look | None = None
    without_blocks: float | None = None
    notes: list[Note] = field(default_factory=list)
    complete: bool = False

    def bounded(self, index: int) -> bool:
        """Whether what the block gains by itself is bounded by a slope, and not measured."""
        return index in self.first_order and index not in self.alone
