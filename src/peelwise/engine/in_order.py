"""Layers in the order in which they run, each with the inputs that it gets from those that were changed before it.

Two models are walked side by side, block by block: the parent as it is, and its copy with the changes so far. Stations
of both, and the sums of one group of layers, are alive at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from peelwise.engine.session import Changes, change_to, run_captured, run_until
from peelwise.engine.sweep import token_rows
from peelwise.model.capture import Call
from peelwise.model.handed import Handed
from peelwise.model.layers import Block, LinearLayer
from peelwise.model.runner import Runner
from peelwise.model.splice import spliced
from peelwise.model.trace import Batch, Trace, by_token
from peelwise.records.base import Note, note
from peelwise.references.asymmetric import InputSums
from peelwise.stats.gram import CrossSum, GramSum, widened

_SAME = 1e-3  # of the norm of what a block adds to the stream: rounding, half precision included


def few_tokens(tokens: Iterable[tuple[LinearLayer, int]]) -> Iterator[Note]:
    """Say where fewer tokens made a layer's sums than it has inputs: of the widest layer, and of the worst mixture.

    Args:
        tokens: that each layer was given; experts are given those that their routers send them.
    """
    plain: dict[str, tuple[int, int]] = {}
    mixtures: dict[str, list[tuple[int, int]]] = {}
    for linear, seen in tokens:
        width = linear.weight().shape[1]
        if linear.is_expert:
            mixtures.setdefault(linear.name.rsplit(".", 2)[0], []).append((width, seen))
        elif width > seen:
            plain[linear.name] = width, seen
    if plain:
        name = max(plain, key=lambda name: plain[name])
        inputs, seen = plain[name]
        yield note("few-fit-tokens", layer=name, tokens=seen, inputs=inputs, rank=seen, more=len(plain) - 1)
    few = {name: [seen for width, seen in of_all if seen < width] for name, of_all in mixtures.items()}
    worst = max(few, key=lambda name: len(few[name]), default=None)
    if worst is not None and few[worst]:
        none = sum(seen == 0 for seen in few[worst])
        counts = {"matrices": len(few[worst]), "of": len(mixtures[worst]), "without": none}
        yield note("few-expert-tokens", block=worst, **counts, more=sum(map(bool, few.values())) - 1)


@dataclass
class Walk:
    """A model and its parent on some parts of a probe, as far as it has been walked.

    Args:
        parent: the full-precision model.
        own: the model that is changed layer by layer; the parent itself will do.
        twins: the parent's layer of every layer of ``own`` that is to be changed.
        parts: traces of the parent, of each part of the probe.
        stations: per part and micro-batch, what enters the first block of ``own``, ``[b, t, d]``.
        calls: per part, the micro-batches of ``own``, whose arguments its blocks are called with.

    Attributes:
        changes: what is in place, per layer of ``own``; callers add to it while they walk.
    """

    parent: Runner
    own: Runner
    twins: Mapping[LinearLayer, LinearLayer]
    parts: Sequence[Trace]
    calls: Sequence[Trace]
    changes: Changes = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.calls = [
            replace(trace, batches=[replace(batch, calls=list(batch.calls)) for batch in trace.batches])
            for trace in self.calls
        ]
        self._hidden = [[batch.stations[0] for batch in trace.batches] for trace in self.calls]

    def groups(self, block: Block) -> Iterator[tuple[list[LinearLayer], list[InputSums]]]:
        """Yield the layers of a block that share their input, in the order they run in, with sums for each part.

        Those of ``changes`` are in place when the next group is yielded.
        """
        wanted = [linear for linear in block.linears if linear in self.twins]
        before = self._parent_inputs(block, wanted)
        order = _in_running_order(before)
        writers = self._writers(block, before[0], order)
        for group in order:
            earlier = writers[: writers.index(group[0])] if group[0] in writers else None
            yield group, [self._sums(block, group[0], n, before[n], earlier) for n in range(len(self.parts))]

    def put(self, linear: LinearLayer, weight: Tensor) -> None:
        """Have another weight ``[d_out, d_in]`` in place; its change is on disk where the model's weights are."""
        self.changes[linear] = self.own.kept(change_to(linear, weight))

    @torch.no_grad()
    def leave(self, block: Block) -> list[float]:
        """Go on to the next block; return for each part ``E|H - H'|^2 / E|H - mean|^2`` of the stations behind it.

        ``H`` is the parent's station behind the block, ``H'`` that of the model with the changes.
        """
        shares = []
        for number, (trace, calls) in enumerate(zip(self.parts, self.calls, strict=True)):
            apart = spread = 0.0
            for i, (there, here) in enumerate(zip(trace.batches, calls.batches, strict=True)):
                handed = Handed()
                with spliced(self._of(block)):
                    hidden = self.own.run_block(block, self._hidden[number][i], here, handed)
                here.hand_on(block.index, handed)
                self._hidden[number][i] = hidden
                own, theirs = (by_token(h, here.weights).double() for h in (hidden, there.stations[block.index + 1]))
                apart += float((own - theirs).square().sum())
                spread += float((theirs - theirs.mean(0)).square().sum())
            shares.append(apart / spread if spread else 0.0)
        return shares

    def _of(self, block: Block) -> Changes:
        return {linear: self.changes[linear] for linear in block.linears if linear in self.changes}

    @torch.no_grad()
    def _parent_inputs(self, block: Block, wanted: Sequence[LinearLayer]) -> list[list[dict[LinearLayer, list[Call]]]]:
        """Return per part and micro-batch the runs of the layers in the parent, under the names of ``own``."""
        above = self.parent.blocks[block.index]
        names = {self.twins[linear]: linear for linear in wanted}
        found: list[list[dict[LinearLayer, list[Call]]]] = []
        for trace in self.parts:
            of_part = []
            for batch in trace.batches:
                _, capture = run_captured(self.parent, above, batch, batch.stations[above.index], {}, list(names))
                of_part.append({names[twin]: calls for twin, calls in capture.calls.items()})
            found.append(of_part)
        return found

    def _writers(
        self, block: Block, before: list[dict[LinearLayer, list[Call]]], order: Sequence[Sequence[LinearLayer]]
    ) -> list[LinearLayer]:
        """Return the layers whose outputs are added to the stream, in running order; none if they are not all of it.

        It is tried: in the first micro-batch their outputs must add up to what the parent's block adds.
        """
        trace, calls = self.parts[0].batches[0], before[0]
        there, here = (trace.stations[block.index + i].float() for i in (1, 0))
        found = [
            group[0]
            for group in order
            if len(group) == 1 and [call.y.shape for call in calls.get(group[0], [])] == [here.shape]
        ]
        added = sum((calls[linear][0].y.float() for linear in found), torch.zeros_like(here))
        at = trace.attended
        apart, whole = by_token(there - here - added, at).norm(), by_token(there - here, at).norm()
        return found if found and float(apart) <= _SAME * float(whole) else []

    @torch.no_grad()
    def _sums(
        self,
        block: Block,
        first: LinearLayer,
        number: int,
        before: list[dict[LinearLayer, list[Call]]],
        earlier: Sequence[LinearLayer] | None,
    ) -> InputSums:
        """Return the sums of one group; ``earlier`` are the layers that wrote to the stream before, if it does too."""
        zz, lost, stream, paired = GramSum(), CrossSum(), CrossSum(), True
        for i_batch, (batch, hidden, theirs) in enumerate(
            zip(self.calls[number].batches, self._hidden[number], before, strict=True)
        ):
            twins = theirs.get(first, [])
            capture = run_until(self.own, block, batch, hidden, self._of(block), (first, len(twins)), earlier or ())
            runs = capture.calls.get(first, [])
            if earlier is not None and paired:
                gap = self.parts[number].batches[i_batch].stations[block.index] - hidden
                for writer in earlier:
                    gap = gap + theirs[writer][0].y - capture.calls[writer][0].y
                stream.update(widened(by_token(gap, batch.read)), _rows(runs[0], batch, first))
            paired = paired and len(runs) == len(twins)
            for i, call in enumerate(runs):
                z = _rows(call, batch, first)
                zz.update(z)
                paired = paired and _same_tokens(call, twins[i])
                if paired:
                    lost.update(_rows(twins[i], batch, first) - z, z)
        if not zz.n:
            d_in = first.weight().shape[1]
            return InputSums(torch.zeros(d_in, d_in), tokens=0)
        return InputSums(
            zz.mean().float(),
            lost.mean().float() if paired and lost.n else None,
            stream.mean().float() if paired and stream.n else None,
            zz.n,
        )


def _rows(call: Call, batch: Batch, linear: LinearLayer) -> Tensor:
    return token_rows(call.x, call, batch, linear, ones=False)


def _same_tokens(one: Call, other: Call) -> bool:
    """Whether two runs of a layer are on the same tokens: experts get those that their routers chose."""
    if one.x.shape != other.x.shape or (one.rows is None) != (other.rows is None):
        return False
    return one.rows is None or other.rows is None or torch.equal(one.rows, other.rows)


def _in_running_order(before: Sequence[Sequence[Mapping[LinearLayer, list[Call]]]]) -> list[list[LinearLayer]]:
    """Return the layers that ran, those that were given the very same tensors together, in the order they ran in."""
    groups: dict[tuple[int, ...], list[LinearLayer]] = {}
    for linear in dict.fromkeys(linear for part in before for batch in part for linear in batch):
        calls = tuple(id(call.x) for part in before for batch in part for call in batch.get(linear, []))
        groups.setdefault(calls, []).append(linear)
    return list(groups.values())
