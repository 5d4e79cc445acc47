"""What the sums of a block propose for its linear layers: solves, and the signals that come with them.

Layers that share an input share the decomposition of its second moments, which is most of the work. Such groups need
nothing of each other: processes that share a sweep share them out.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch

from peelwise.distributed.processes import ONE_PROCESS, Processes
from peelwise.distributed.shared import Shared
from peelwise.engine.signals import LayerSums, OfWeight, Routed, of_block, of_layer, of_weight, routed
from peelwise.errors import IllConditionedWarning
from peelwise.model.layers import Block, LinearLayer
from peelwise.model.spill import Spill
from peelwise.records.signals import RANKED_BY, SWEPT
from peelwise.references.coded import LocalProblem
from peelwise.references.whitened import InputWhitened, Proposal, two_sided
from peelwise.stats.gram import Moments
from peelwise.stats.linalg import Spectrum

PROPOSAL_DTYPE = torch.bfloat16

Direction = Literal["input-whitened", "two-sided"]
DIRECTIONS: tuple[Direction, ...] = ("input-whitened", "two-sided")


@dataclass(frozen=True)
class BlockProposals:
    """What one sweep proposes for one block, and the signals that rank it.

    Attributes:
        changes: per direction and map, the calibrated proposal.
        signals: by name, the signals of the block that a sweep gives (`records.signals.SWEPT`).
        local: per low-bit map, the sums that better codes are found from; as large as the maps themselves.
    """

    index: int
    changes: dict[Direction, dict[LinearLayer, Proposal]]
    signals: dict[str, float]
    local: dict[LinearLayer, LocalProblem] = field(default_factory=dict)

    @property
    def ranking(self) -> float:
        """What ranks blocks before anything is evaluated; where the two-sided direction was not made, the other's."""
        return self.signals.get(RANKED_BY, self.signals["held_out_energy"])


@dataclass(frozen=True)
class _Group:
    """Layers of a block that share an input: their sums per set of targets, those of select, and with the weights."""

    linears: tuple[LinearLayer, ...]
    fits: list[dict[LinearLayer, Moments]]
    select: dict[LinearLayer, Moments]
    routed: dict[LinearLayer, Routed]
    of_weights: list[dict[LinearLayer, OfWeight]]

    def cost(self, directions: Sequence[Direction]) -> float:
        """Return about how many operations it takes to solve."""
        first = self.linears[0]
        outputs = [self.fits[0][linear].C.shape[0] for linear in self.linears]
        return operations(self.fits[0][first].S.shape[0], outputs, len(self.fits), two_sided="two-sided" in directions)


def operations(d_in: int, outputs: Sequence[int], targets: int = 1, *, two_sided: bool = True) -> float:
    """Return about how many operations it takes to solve for layers that share an input.

    Args:
        d_in: width of the input.
        outputs: widths of the outputs of the layers.
        targets: how many sets of targets there are.
        two_sided: whether the two-sided direction is made too.
    """
    total = 13.0 * d_in**3  # the decomposition, and S of select in its basis
    for d_out in outputs:
        total += targets * 8 * d_out * d_in**2
        if two_sided:
            total += targets * (d_out**3 / 3 + 6 * d_out**2 * d_in + 4 * d_out * d_in**2)
    return total


@dataclass(frozen=True)
class _Solved:
    """What was found for one layer; the changes in half precision, because those of all blocks are alive together."""

    changes: dict[Direction, Proposal]
    signals: dict[str, float | None]
    local: LocalProblem | None


_Result = tuple[list[list[_Solved]], list[IllConditionedWarning]]


@dataclass(frozen=True)
class _Asked:
    """A block whose groups are dealt out: their layers, the order of all layers per set of targets, and their rows."""

    block: Block
    groups: list[tuple[LinearLayer, ...]]
    order: list[list[LinearLayer]]
    rows: dict[LinearLayer, int]

    def joined(self, more: _Asked) -> _Asked:
        """Return this one with further layers of the same block."""
        order = [[*first, *second] for first, second in zip(self.order, more.order, strict=True)]
        return _Asked(self.block, [*self.groups, *more.groups], order, self.rows | more.rows)


class Solves:
    """Finds what the sums of blocks propose, each group of layers with one input in one of the processes.

    Where there are several, blocks are solved as many at a time: the widest input of a block takes longer than all its
    others, so that the groups of one block alone cannot be shared out evenly.

    Args:
        processes: those that share.
        directions: which directions to make.
        spill: where what is proposed goes to; ``None``: it stays in memory.
    """

    def __init__(self, processes: Processes, directions: Sequence[Direction], spill: Spill | None = None) -> None:
        self._most, self._directions, self._spill = processes.count, directions, spill
        self._shared: Shared[_Result] = Shared(processes)
        self._asked: list[_Asked] = []
        self._early: list[_Result] = []

    @property
    def enough(self) -> bool:
        """Whether so many blocks wait that all processes have something to do."""
        return len(self._asked) >= self._most

    def ask(
        self,
        block: Block,
        fits: Sequence[dict[LinearLayer, Moments]],
        select: dict[LinearLayer, Moments],
        *,
        more: bool = False,
    ) -> None:
        """Ask for what the moments of one block's layers propose.

        What takes a weight is worked out here: pieces are done later, where a weight need not be whole any more.

        Args:
            block: the block.
            fits: per set of targets, the moments of the fit tokens, which share ``S``.
            select: moments of the select tokens.
            more: whether other layers of this block are asked about next. These are solved at once then, so that their
                sums need not be there together with those of the others.
        """
        # An expert that select gives no token cannot be calibrated; it stays as it is.
        fits = [{linear: moments for linear, moments in fit.items() if linear in select} for fit in fits]
        by_input: dict[int, list[LinearLayer]] = {}
        for linear, moments in fits[0].items():
            by_input.setdefault(id(moments.S), []).append(linear)  # the very tensor
        tokens_of = routed(block, fits[0])
        groups = [
            _Group(
                tuple(linears),
                [{m: fit[m] for m in linears if m in fit} for fit in fits],
                {m: select[m] for m in linears},
                {m: tokens_of[m] for m in linears if m in tokens_of},
                [{m: of_weight(m, fit[m]) for m in linears if m in fit} for fit in fits],
            )
            for linears in by_input.values()
        ]
        if self._most > 1:
            groups.sort(key=lambda group: -group.cost(self._directions))
        for group in groups:
            self._shared.ask(group.cost(self._directions), partial(_solved, group, self._directions))
        rows = {linear: moments.n for linear, moments in fits[0].items()}
        asked = _Asked(block, [group.linears for group in groups], [list(fit) for fit in fits], rows)
        if self._asked and self._asked[-1].block is block:
            asked = self._asked.pop().joined(asked)
        self._asked.append(asked)
        if more:
            self._early += self._results()

    def made(self) -> list[list[BlockProposals]]:
        """Return for every block that was asked about what is proposed for it, one for each set of targets.

        What the solves warned of is said in all processes, block by block in the order of their layers.
        """
        results = iter([*self._early, *self._results()])
        asked, self._asked, self._early = self._asked, [], []
        return [_assembled(each, [next(results) for _ in each.groups], self._directions) for each in asked]

    def _results(self) -> list[_Result]:
        """Solve what was asked for; what is proposed goes where it is kept."""
        return [
            ([[_kept(each, self._spill) for each in layers] for layers in found], said)
            for found, said in self._shared.results()
        ]


def proposals_of(
    block: Block,
    fits: Sequence[dict[LinearLayer, Moments]],
    select: dict[LinearLayer, Moments],
    directions: Sequence[Direction],
) -> list[BlockProposals]:
    """Return for each set of targets what the moments of one block's layers propose.

    Args:
        block: the block.
        fits: per set of targets, the moments of the fit tokens, which share ``S``.
        select: moments of the select tokens.
        directions: which directions to make.
    """
    solves = Solves(ONE_PROCESS, directions)
    solves.ask(block, fits, select)
    return solves.made()[0]


def _solved(group: _Group, directions: Sequence[Direction]) -> _Result:
    """Return what is found for the layers of a group, for each set of targets, and what was warned of meanwhile.

    By their places, not by themselves: modules do not travel between processes.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", IllConditionedWarning)
        found = _solutions(group, directions)
    said = [each.message for each in caught]
    for other in (each for each in caught if not isinstance(each.message, IllConditionedWarning)):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return found, [message for message in said if isinstance(message, IllConditionedWarning)]


def _solutions(group: _Group, directions: Sequence[Direction]) -> list[list[_Solved]]:
    first = group.linears[0]
    S = group.fits[0][first].S
    reference = InputWhitened(S, group.select[first].S, name=first.name)
    if not first.is_expert:
        _warn_of_rank(first, group.fits[0][first], reference.spectrum)
    rotated_select = {linear: reference.rotate(group.select[linear].C) for linear in group.linears}
    low_bit = any(linear.low_bit for linear in group.linears)
    shared = S.float() if low_bit else S  # layers of one input share it here too
    solutions = []
    for fit, of_weights in zip(group.fits, group.of_weights, strict=True):
        of_layers = []
        for linear, moments in fit.items():
            select, rotated = group.select[linear], reference.rotate(moments.C)
            whitened = reference.propose(moments.C, select.C, rotated=rotated, rotated_select=rotated_select[linear])
            natural = two_sided(moments, select, whitened, name=linear.name) if "two-sided" in directions else None
            sums = LayerSums(
                linear,
                moments,
                select,
                reference,
                rotated,
                rotated_select[linear],
                whitened,
                natural,
                group.routed.get(linear),
                of_weights[linear],
            )
            # The one that is better as a rule comes first: a search of the other is cut short when it cannot win.
            made: dict[Direction, Proposal] = {} if natural is None else {"two-sided": natural}
            if "input-whitened" in directions:
                made["input-whitened"] = whitened
            local = _local(linear, shared, moments, made) if linear.low_bit else None
            halved = {d: replace(p, change=p.change.to(PROPOSAL_DTYPE)) for d, p in made.items()}
            of_layers.append(_Solved(halved, of_layer(SWEPT, sums), local))
        solutions.append(of_layers)
    return solutions


def _assembled(asked: _Asked, solved: Sequence[_Result], directions: Sequence[Direction]) -> list[BlockProposals]:
    """Put together what was found for the groups of one block, and warn of what is to be warned of."""
    ways = [direction for direction in reversed(DIRECTIONS) if direction in directions]
    of_targets: list[dict[LinearLayer, _Solved]] = [{} for _ in asked.order]
    warned: dict[LinearLayer, list[IllConditionedWarning]] = {}
    for linears, (found, said) in zip(asked.groups, solved, strict=True):
        warned[linears[0]] = said
        for order, of_layers, into in zip(asked.order, found, of_targets, strict=True):
            into.update(zip((m for m in linears if m in order), of_layers, strict=True))
    for said in (warned.get(linear, []) for linear in asked.order[0]):
        for each in said:
            warnings.warn(each, stacklevel=2)
    few_tokens = _few_tokens(asked.block, asked.rows)
    if few_tokens is not None:
        warnings.warn(few_tokens, stacklevel=2)
    made = []
    for order, by_layer in zip(asked.order, of_targets, strict=True):
        ordered = {linear: by_layer[linear] for linear in order}
        changes = {way: {linear: each.changes[way] for linear, each in ordered.items()} for way in ways}
        signals = of_block(SWEPT, [each.signals for each in ordered.values()])
        local = {linear: each.local for linear, each in ordered.items() if each.local is not None}
        made.append(BlockProposals(asked.block.index, changes, signals, local=local))
    return made


def _kept(solved: _Solved, spill: Spill | None) -> _Solved:
    if spill is None:
        return solved
    return replace(solved, changes={d: replace(p, change=spill.kept(p.change)) for d, p in solved.changes.items()})


def _local(
    linear: LinearLayer, S: torch.Tensor, moments: Moments, changes: Mapping[Direction, Proposal]
) -> LocalProblem:
    """Return the sums of one low-bit map without the column of its bias; maps that share an input share ``S``."""
    inputs, outputs = (changes[d].damping if d in changes else 0.0 for d in DIRECTIONS)
    F = None if moments.F is None else moments.F.float()
    if linear.has_bias:
        return LocalProblem(S[:-1, :-1], F, inputs, outputs, S[:-1, -1])
    return LocalProblem(S, F, inputs, outputs)


def _few_tokens(block: Block, seen: Mapping[LinearLayer, int]) -> IllConditionedWarning | None:
    """Return one warning for all experts of a block that few tokens were routed to, or none."""
    experts = [linear for linear in block.linears if linear.is_expert]
    rows = {linear: seen.get(linear, 0) for linear in experts}
    few = {linear: n for linear, n in rows.items() if n < linear.shape[1]}
    if not few:
        return None
    none = sum(n == 0 for n in few.values())
    text = (
        f"{block.name}: {len(few)} of {len(experts)} matrices of experts saw fewer fit tokens than they have inputs, "
        f"{none} of them none on fit or select. Damping keeps the result valid; more fit tokens would sharpen it."
    )
    return IllConditionedWarning(
        text, "few-expert-tokens", block=block.name, matrices=len(few), of=len(experts), without=none
    )


def _warn_of_rank(linear: LinearLayer, moments: Moments, spectrum: Spectrum) -> None:
    """Warn where tokens are too few; inputs that lack directions by nature (behind a norm) are no reason to."""
    d = moments.S.shape[0]
    if moments.n < d:
        rank = spectrum.rank()
        text = (
            f"{linear.name}: {moments.n} fit tokens for {d} inputs make its [{d}, {d}] sum rank deficient (rank "
            f"{rank}). Damping keeps the result valid; more fit tokens would sharpen it."
        )
        values: dict[str, int | float | str] = {
            "layer": linear.name,
            "tokens": int(moments.n),
            "inputs": d,
            "rank": int(rank),
        }
        warnings.warn(IllConditionedWarning(text, "few-fit-tokens", **values), stacklevel=2)
