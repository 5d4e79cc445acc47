"""Two models of one architecture: which part's change hurt, which helped, and what kind of change it is.

Every part (embedding, each block, the final norm, the head) is taken from OLD into NEW and from NEW into OLD, the rest
left as it is; then parts are put back one after another from either end, and in the blocks that matter most the layers
one by one. No gradients: half a forward pass per block and direction.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from peelwise.engine.clock import Clock, Watcher
from peelwise.engine.opening import checked_blocks
from peelwise.engine.provenance import Setup, model_record, versions
from peelwise.engine.session import LOSSES
from peelwise.errors import ModelError, UnsupportedModelError
from peelwise.evidence.compare import conclusion
from peelwise.evidence.verdict import default_margin
from peelwise.model.architectures import is_encoder_decoder
from peelwise.model.fingerprint import identify
from peelwise.model.guard import untouched
from peelwise.model.layers import Block, device_of, vocabulary_size
from peelwise.model.runner import Runner, check_replay
from peelwise.model.selfcheck import check_causal, check_own_loss
from peelwise.probe.examples import Examples
from peelwise.probe.probe import Probe
from peelwise.probe.rows import Split
from peelwise.records.base import Interval, Note, note
from peelwise.records.compare import (
    BlockChange,
    Cause,
    CompareLosses,
    CompareRecord,
    EndChange,
    FirstDifference,
    KindOfChange,
    TensorChange,
)
from peelwise.tasks.compare import measures
from peelwise.tasks.compare.measures import Measured, Pair, Part
from peelwise.tasks.compare.mended import measure_mended, part_sha256, parts_to_mend
from peelwise.tasks.compare.mixing import Side
from peelwise.tasks.compare.outputs import Outputs, block_outputs, end_outputs, of_end
from peelwise.tasks.compare.settings import CompareSettings
from peelwise.tasks.compare.tensors import Twins, block_twins, end_twins


@dataclass(frozen=True, eq=False)
class Candidate:
    """A model with what the record says about it."""

    model: nn.Module
    name: str
    source: str | None = None


@dataclass
class _Found:
    """Per part: its tensors and what it computes; and what was measured."""

    twins: dict[Part, Twins] = field(default_factory=dict)
    outputs: dict[Part, Outputs] = field(default_factory=dict)
    measured: Measured = field(default_factory=Measured)
    notes: list[Note] = field(default_factory=list)
    complete: bool = True

    def computes_the_same(self, part: Part) -> bool:
        """Whether exchanging the part can change nothing: equal weights and equal outputs."""
        return self.twins[part].same and self.outputs[part].same


def run_compare(
    old: Candidate, new: Candidate, probe: Probe, settings: CompareSettings, watcher: Watcher | None = None
) -> CompareRecord:
    """Compare NEW with OLD and leave both as they were. Ctrl-C ends it early with what was finished.

    Args:
        old: what NEW was made from.
        new: the model in question.
        probe: the text or batches; everything shown is measured on report, and nothing is fitted.
        settings: budget, margin and how much of it.
        watcher: told about progress.

    Raises:
        ModelError: If they are the same module, or differ in blocks, layers, shapes or vocabulary.
        UnsupportedModelError: If the architecture cannot be measured, or is an encoder-decoder.
        ProbeError: If the probe does not fit.
    """
    check_two(old, new)
    if probe.examples is not None and is_encoder_decoder(new.model):
        raise UnsupportedModelError(
            f"Not yet: {type(new.model).__name__} is an encoder-decoder. What its encoder makes is given to every "
            "block of its decoder, so exchanging one block would exchange the encoder for it too."
        )
    with _said_of("OLD"):
        before = checked_blocks(old.model, probe, batches=True)
    with _said_of("NEW"):
        after = checked_blocks(new.model, probe, batches=True)
    with untouched(old.model), untouched(new.model):
        runners = [
            Runner(each.model, blocks, micro_batch_tokens=settings.micro_batch_tokens)
            for each, blocks in ((old, before), (new, after))
        ]
        runners[0].work = runners[1].work
        clock = Clock(settings.budget_seconds, runners[1].work, watcher)
        found = _Found()
        with clock.stage("changes"):
            twins, ends = block_twins(before, after), end_twins(runners[0], runners[1])
        with clock.stage(LOSSES):
            sides = [opened_side(runner, probe.report, probe.fit) for runner in runners]
            pair = Pair(sides[0], sides[1], clock)
            for part in pair.parts:
                found.twins[part] = ends[part.unit] if part.block is None else twins[part.block]
        try:
            _stages(pair, found, settings)
        except KeyboardInterrupt:
            found.complete = False
            found.notes.append(note("stopped"))
        loss, blocks, other = _losses(pair, found), _blocks(pair, found), _ends(pair, found)
        margin = settings.margin if settings.margin is not None else default_margin(min(loss.old, loss.new), probe.unit)
        follows = conclusion(loss, blocks, other, margin)
        with clock.stage("mended"):
            mended = measure_mended(pair, parts_to_mend(pair, follows, {b.index: b.same_code for b in blocks}))
        cost = clock.record(probe.report.tokens, device_of(new.model))
    records = [
        model_record(Setup(c.model, b, c.name, c.source, identify(c.model), {}, probe.seed))
        for c, b in ((old, before), (new, after))
    ]
    return CompareRecord(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        conclusion=follows,
        complete=found.complete,
        margin_nats=margin,
        informative=None,
        old=records[0],
        model=records[1],
        probe=probe.record(),
        loss=loss,
        first_difference=_first_difference(pair, found),
        blocks=blocks,
        ends=other,
        mended=mended,
        cost=cost,
        notes=(*_shared(old.model, new.model), *found.notes),
        settings=settings.plain(),
        seed=probe.seed,
        versions=versions(),
    )


def check_two(old: Candidate, new: Candidate) -> None:
    """Refuse two models that cannot be put together.

    Raises:
        ModelError: If they are the same module, know other vocabularies, or are on two devices.
    """
    if old.model is new.model:
        raise ModelError(
            "OLD and NEW are one and the same module, so nothing can differ. Give a copy (copy.deepcopy) from before "
            "the change, or its checkpoint."
        )
    sizes = vocabulary_size(old.model), vocabulary_size(new.model)
    if None not in sizes and sizes[0] != sizes[1]:
        raise ModelError(
            f"OLD ({old.name}) knows {sizes[0]} tokens, NEW ({new.name}) {sizes[1]}. Compare models of one vocabulary: "
            "a model and what was made from it."
        )
    devices = device_of(old.model), device_of(new.model)
    if devices[0] != devices[1]:
        raise ModelError(f"OLD is on {devices[0]}, NEW on {devices[1]}: move both to one device.")


@contextmanager
def _said_of(which: str) -> Iterator[None]:
    """Let an error about a model say which of the two it is about."""
    try:
        yield
    except (ModelError, UnsupportedModelError) as error:
        raise type(error)(f"{which}: {error}") from error


def opened_side(runner: Runner, report: Split, fit: Split) -> Side:
    """Return a model run over report, after the self-checks that exchanging its parts rests on.

    Raises:
        UnsupportedModelError: If calling the blocks one by one is not what the model does.
        ModelError: If its loss is no finite number.
    """
    few = runner.trace(fit.at(slice(1)))
    check_replay(runner, few)
    if isinstance(report, Examples):
        check_own_loss(runner, few)
    else:
        check_causal(runner, few.batches[0])
    trace = runner.trace(report)
    if not math.isfinite(trace.mean):
        name = type(runner.model).__name__
        raise ModelError(f"The loss of {name} on the probe is {trace.mean}: its activations overflow. Try float32.")
    return Side(runner, trace)


def _stages(pair: Pair, found: _Found, settings: CompareSettings) -> None:
    """Measure in the order of what is worth most: who is different, what repairs, what breaks, layers, the path."""
    clock, measured = pair.clock, found.measured
    with clock.stage("outputs"):
        ends = end_outputs(pair.old, pair.new)
        for done, part in enumerate(pair.parts):
            clock.tell(done, len(pair.parts))
            same = found.twins[part].same
            found.outputs[part] = (
                block_outputs(pair.old, pair.new, part.block, same_weights=same)
                if part.block is not None
                else of_end(ends[part.unit], pair.old, pair.new, same_weights=same)
            )
    changed = [part for part in pair.parts if not found.computes_the_same(part)]
    nothing = pair.gain(pair.new.trace.losses, pair.new.trace.losses).interval()
    for part in pair.parts:
        if part not in changed:
            measured.repairs[part] = measured.breaks[part] = nothing
            measured.from_first[part] = measured.from_last[part] = nothing
    # The largest differences first, so that a budget that ends early has seen what matters.
    ordered = sorted(changed, key=lambda part: -found.outputs[part].distance)
    with clock.stage("repairs"):
        complete = measures.measure_repairs(pair, ordered, measured)
    with clock.stage("breaks"):
        complete &= measures.measure_breaks(pair, ordered, measured)
    with clock.stage("layers"):
        for block, names in _layers(pair, found, settings.layers_of):
            complete &= measures.measure_layers(pair, block, names, measured)
    if settings.path and changed:
        with clock.stage("swap-path"):
            complete &= measures.measure_path(pair, changed, measured)
    found.complete = complete
    if not complete:
        found.notes.append(note("budget-ended"))


def _layers(pair: Pair, found: _Found, most: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the blocks with the largest repairs, and their modules that hold changed tensors."""
    repairs = found.measured.repairs
    changed = [p for p in pair.parts if p.block is not None and p in repairs and not found.twins[p].same]
    for part in sorted(changed, key=lambda part: -abs(repairs[part].mean))[:most]:
        names = [n.rpartition(".")[0] for n, kind in found.twins[part].kinds.items() if kind.code != "unchanged"]
        assert part.block is not None
        yield part.block, list(dict.fromkeys(names))


def _losses(pair: Pair, found: _Found) -> CompareLosses:
    damage = pair.gain(pair.new.trace.losses, pair.old.trace.losses)
    repairs = [found.measured.repairs.get(part) for part in pair.parts]
    known = [each.mean for each in repairs if each is not None]
    return CompareLosses(
        old=pair.old.trace.mean,
        new=pair.new.trace.mean,
        damage=damage.interval(),
        interaction=damage.mean - sum(known) if len(known) == len(repairs) else None,
    )


def _first_difference(pair: Pair, found: _Found) -> FirstDifference | None:
    for part in pair.parts:
        outputs = found.outputs.get(part)
        if outputs is not None and not outputs.same:
            cause: Cause = "config-or-code" if found.twins[part].same else "weights"
            return FirstDifference(unit=part.unit, block=part.block, cause=cause, output_distance=outputs.distance)
    return None


def _blocks(pair: Pair, found: _Found) -> tuple[BlockChange, ...]:
    parts = [part for part in pair.parts if part.block is not None]
    return tuple(
        BlockChange(index=block.index, name=block.name, **_change(pair, part, found, block))
        for part, block in zip(parts, pair.new.blocks, strict=True)
    )


def _ends(pair: Pair, found: _Found) -> tuple[EndChange, ...]:
    return tuple(
        EndChange(unit=part.unit, **_change(pair, part, found, None)) for part in pair.parts if part.block is None
    )


def _change(pair: Pair, part: Part, found: _Found, block: Block | None) -> dict[str, Any]:
    twins, outputs, measured = found.twins[part], found.outputs.get(part), found.measured
    kind = twins.kind
    code: KindOfChange = kind.code
    if outputs is not None and (
        (code == "unchanged" and not outputs.same) or (code == "rounding" and outputs.same_code is False)
    ):
        code = "config-or-code"
    steps = [each[part] for each in (measured.from_first, measured.from_last) if part in each]
    repairs = measured.repairs.get(part)
    return {
        "kind_of_change": code,
        "kind_values": kind.values if code == kind.code else {},
        "same_weights": twins.same,
        "same_code": None if outputs is None else outputs.same_code,
        "relative_distance": twins.relative,
        "output_distance": 0.0 if outputs is None else outputs.distance,
        "repairs_nats": repairs,
        "breaks_nats": measured.breaks.get(part),
        "path_from_first_nats": measured.from_first.get(part),
        "path_from_last_nats": measured.from_last.get(part),
        "interaction_nats": _interaction(steps, repairs),
        "tensors": tuple(_tensors(twins, measured, block)),
        "old_sha256": part_sha256(pair.old.runner, part),
    }


def _interaction(steps: Sequence[Interval], repairs: Interval | None) -> float | None:
    if len(steps) < 2 or repairs is None:
        return None
    return sum(step.mean for step in steps) / len(steps) - repairs.mean


def _tensors(twins: Twins, measured: Measured, block: Block | None) -> Iterator[TensorChange]:
    for tensor in twins.tensors:
        layer = None if block is None else f"{block.name}.{tensor.name.rpartition('.')[0]}"
        kind = twins.kinds[tensor.name]
        yield TensorChange(
            name=tensor.name,
            kind_of_change=kind.code,
            kind_values=kind.values,
            relative_distance=tensor.relative,
            repairs_nats=measured.layers.get(layer) if layer and kind.code != "unchanged" else None,
        )


def _shared(old: nn.Module, new: nn.Module) -> Iterator[Note]:
    own = {id(p) for p in old.parameters()}
    count = sum(id(p) in own for p in new.parameters())
    if count:
        yield note("shared-tensors", count=count)
