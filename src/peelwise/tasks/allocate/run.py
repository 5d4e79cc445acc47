"""Which layers get how many bits: damage per layer and format is predicted, corrected block by block, and spent on.

    1. per layer and format: codes by rounding with error feedback, and what they are predicted to cost
    2. per block and format: what the block in that format really costs on select, all else in full precision
    3. an integer programme under the budget, on the predictions as they are and as corrected by 2
    4. the plan with the lowest loss on select, uniform formats within the budget among them; shown on report

Layers that share their input (queries, keys and values; gate and up) decide together: their weights are often fused. So
do the experts of one parameter.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from peelwise.engine.clock import Clock, Watcher
from peelwise.engine.curvature import fits, output_curvatures
from peelwise.engine.fitting import check_fits, usual_layout
from peelwise.engine.in_order import Walk, few_tokens
from peelwise.engine.opening import checked_blocks
from peelwise.engine.provenance import Setup, model_record, versions
from peelwise.engine.session import LOSSES, Changes, ReportSession
from peelwise.errors import FormatError
from peelwise.formats.base import Format
from peelwise.formats.dense import Dense
from peelwise.model.fingerprint import identify
from peelwise.model.guard import untouched
from peelwise.model.layers import Block, LinearLayer, device_of
from peelwise.model.runner import Runner
from peelwise.model.selfcheck import self_check
from peelwise.model.trace import Trace
from peelwise.probe.probe import Probe
from peelwise.records.allocation import AllocatedLayer, AllocationRecord, CurvePoint, Interaction
from peelwise.records.base import note
from peelwise.references.allocation import bits_of, cheapest
from peelwise.tasks.allocate.groups import Group, bits_in, groups_of, is_asked
from peelwise.tasks.allocate.kept import Kept
from peelwise.tasks.allocate.settings import AllocateSettings

# A block's measured damage over its predicted one is taken within these bounds: few tokens measure small ones badly.
_LEAST_FACTOR, _MOST_FACTOR = 0.2, 5.0


@dataclass(frozen=True, eq=False)
class _Measured:
    """What plans are made of: groups with their codes, what each takes, and the model to try plans in.

    ``bits`` ``[groups, formats]``, and as large in nats per token: damages as ``predicted``, and as ``corrected`` by
    blocks that were measured.
    """

    session: ReportSession
    select: Trace
    forms: list[Format]
    groups: list[Group]
    bits: NDArray[np.float64]
    predicted: NDArray[np.float64]
    corrected: NDArray[np.float64]

    @property
    def weights(self) -> int:
        return sum(group.weights for group in self.groups)

    def within(self, plan: Sequence[int], budget: float) -> bool:
        """Whether a plan takes no more than so many bits."""
        return bits_of(plan, self.bits) <= budget * (1 + 1e-9)

    def uniform(self, at: int) -> list[int]:
        """Return the plan of one format for all."""
        return [at] * len(self.groups)

    def changes(self, plan: Sequence[int]) -> Changes:
        """Return what a plan changes."""
        pairs = zip(self.groups, plan, strict=True)
        return {linear: change for g, at in pairs for linear, change in g.changes(at, self.forms[at]).items()}

    def on_select(self, plan: Sequence[int]) -> float:
        """Return the loss on select."""
        return self.select.mean_of(self.session.losses(self.select, self.changes(plan)))

    def on_report(self, plan: Sequence[int]) -> Tensor:
        """Return the losses on report."""
        return self.session.losses(self.session.report, self.changes(plan))


def run_allocate(
    model: nn.Module,
    name: str,
    source: str | None,
    probe: Probe,
    settings: AllocateSettings,
    watcher: Watcher | None = None,
    kept: Kept | None = None,
) -> AllocationRecord:
    """Find the format of every linear layer under a budget of bits, and leave the model exactly as it was.

    Args:
        model: the parent.
        name, source: for the record.
        probe: fit makes codes and predictions, select corrects and chooses, report gives every number shown.
        settings: budget and formats.
        watcher: told about progress.
        kept: where what is found of each block is kept, so that an interrupted run can go on.

    Raises:
        FormatError: If the budget is below the smallest formats, or a format does not go with a layer.
        UnsupportedModelError: If the architecture cannot be measured.
    """
    blocks = checked_blocks(model, probe)
    linears = _asked(blocks)
    layout, said = usual_layout(linears)
    said, settings = () if settings.formats else said, settings.in_layout(layout)
    _check(linears, settings)
    with untouched(model):
        runner = Runner(model, blocks, micro_batch_tokens=settings.micro_batch_tokens)
        clock = Clock(math.inf, runner.work, watcher)
        with clock.stage(LOSSES):
            notes = [*self_check(runner, probe.fit), *([] if fits(linears) else [note("no-curvature")])]
            fit, select, report = (runner.trace(part) for part in (probe.fit, probe.select, probe.report))
        session, forms = ReportSession(runner, report), settings.parsed_formats()
        groups = _groups(runner, (fit, select), forms, linears, kept, clock)
        with clock.stage("block-formats"):
            single = _single_damages(session, select, groups, forms, kept, clock)
        bits, plain = np.array([group.bits for group in groups]), np.array([group.predicted for group in groups])
        corrected = plain * _factors(groups, plain, single, in_nats=fits(linears))
        measured = _Measured(session, select, forms, groups, bits, plain, corrected)
        with clock.stage("codes-losses"):
            results = _results(measured, settings)
        cost = clock.record(probe.fit.tokens + probe.select.tokens + probe.report.tokens, device_of(model))
    return AllocationRecord(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=model_record(Setup(model, blocks, name, source, identify(model), {}, probe.seed)),
        probe=probe.record(),
        budget_bits=settings.bits,
        formats=tuple(form.name for form in forms),
        parent_loss=report.mean,
        cost=cost,
        notes=(*said, *notes, *few_tokens((m.linear, m.tokens) for group in groups for m in group.members)),
        settings=settings.plain(),
        seed=probe.seed,
        versions=versions(),
        **results,
    )


def check_plannable(model: nn.Module, probe: Probe, settings: AllocateSettings) -> None:
    """Refuse what `run_allocate` would, without any other work.

    Raises:
        FormatError: If the budget is below the smallest formats, or a format does not go with a layer.
    """
    linears = _asked(checked_blocks(model, probe))
    _check(linears, settings.in_layout(usual_layout(linears)[0]))


def _asked(blocks: Sequence[Block]) -> list[LinearLayer]:
    """Return the layers that take part."""
    linears = [linear for block in blocks for linear in block.linears if is_asked(linear)]
    if not linears:
        raise FormatError("No linear layer is left to quantise inside the blocks. Give another model.")
    return linears


def _check(linears: Sequence[LinearLayer], settings: AllocateSettings) -> None:
    """Refuse what cannot be planned before any work is done."""
    forms = settings.parsed_formats()
    for linear in linears:
        for form in forms:
            check_fits(linear, form, linears, "--formats")
    _check_budget(linears, forms, settings.bits)


def _groups(
    runner: Runner,
    parts: tuple[Trace, Trace],
    forms: Sequence[Format],
    linears: Sequence[LinearLayer],
    kept: Kept | None,
    clock: Clock,
) -> list[Group]:
    """Return the groups of all blocks, those that are kept as they are."""
    known = {block.index: kept.groups(block, forms) if kept is not None else None for block in runner.blocks}
    curvatures: Mapping[LinearLayer, Tensor] = {}
    if None in known.values():
        with clock.stage("curvature"):
            curvatures = output_curvatures(runner, parts[0], set(linears)) or {}
    groups: list[Group] = []
    with clock.stage("codes"):
        walk = Walk(runner, runner, {m: m for m in linears}, parts, parts)
        for done, block in enumerate(runner.blocks):
            clock.tell(done, len(runner.blocks))
            found = known[block.index] or groups_of(walk, block, forms, curvatures)
            if kept is not None and known[block.index] is None:
                kept.keep_groups(block.index, found, forms)
            groups += found
            walk.leave(block)
    return groups


def _results(measured: _Measured, settings: AllocateSettings) -> dict[str, Any]:
    """Return the parts of the record that follow from what was measured: the plan and what it is compared with."""
    session, weights = measured.session, measured.weights
    report = session.report
    plans = _plans(measured, settings.bits * weights)
    judged = {key: measured.on_select(plan) for key, plan in plans.items()}
    chosen = min(judged, key=lambda key: judged[key])
    plan, losses = plans[chosen], measured.on_report(plans[chosen])
    return {
        "bits_per_weight": bits_of(plan, measured.bits) / weights,
        "chosen": chosen,
        "damage": session.gain(losses, report.losses).interval(),
        "layers": tuple(_lines(measured, plan)),
        "curve": tuple(sorted(_curve(measured, settings.points), key=lambda point: point.bits_per_weight)),
        "better_than": {
            form.name: session.gain(measured.on_report(measured.uniform(at)), losses).interval()
            for at, form in enumerate(measured.forms)
            if measured.within(measured.uniform(at), settings.bits * weights)
        },
        "interaction": Interaction(
            sum_of_single=float(sum(measured.corrected[number, at] for number, at in enumerate(plan))),
            joint=judged[chosen] - measured.select.mean,
        ),
    }


def _check_budget(linears: Sequence[LinearLayer], forms: Sequence[Format], budget: float) -> None:
    """Refuse a budget below the smallest format, before any work is done."""
    weights = sum(linear.weight().numel() for linear in linears)
    bits = {form.name: sum(bits_in(form, linear) for linear in linears) / weights for form in forms}
    smallest = min(bits, key=lambda name: bits[name])
    if bits[smallest] > budget * (1 + 1e-9):
        raise FormatError(
            f"{smallest} takes {bits[smallest]:.2f} bits per weight with its scales, the budget is {budget:g}, and it "
            "is the smallest of the formats. Allow more with --bits, or name a smaller one with --formats."
        )


def _single_damages(
    session: ReportSession,
    select: Trace,
    groups: Sequence[Group],
    forms: Sequence[Format],
    kept: Kept | None,
    clock: Clock,
) -> dict[tuple[int, int], float]:
    """Return for each block and format what the block in it costs on select, nats per token."""
    blocks = sorted({group.block for group in groups})
    found: dict[tuple[int, int], float] = {}
    for done, block in enumerate(blocks):
        clock.tell(done, len(blocks))
        known = kept.damages(block) if kept is not None else None
        own = known or {at: _damage(session, select, groups, block, at, form) for at, form in enumerate(forms)}
        if kept is not None and known is None:
            kept.keep_damages(block, own)
        found |= {(block, at): cost for at, cost in own.items()}
    return found


def _damage(session: ReportSession, select: Trace, groups: Sequence[Group], block: int, at: int, form: Format) -> float:
    changes = {m: c for group in groups if group.block == block for m, c in group.changes(at, form).items()}
    return select.mean_of(session.losses(select, changes, start=block)) - select.mean


def _factors(
    groups: Sequence[Group],
    predicted: NDArray[np.float64],
    single: Mapping[tuple[int, int], float],
    *,
    in_nats: bool,
) -> NDArray[np.float64]:
    """Return by how much the predictions of a block in a format were wrong, ``[groups, formats]``.

    Predictions that only rank (``in_nats`` is false) are first brought to the sum of what was measured.
    """
    unit = 1.0
    if not in_nats and predicted.sum() > 0:
        unit = max(sum(single.values()), 0.0) / float(predicted.sum()) or 1.0
    factors = np.full_like(predicted, unit)
    blocks = np.array([group.block for group in groups])
    for (block, at), measured in single.items():
        inside = blocks == block
        total = predicted[inside, at].sum() * unit
        if total > 0:
            factors[inside, at] = unit * np.clip(measured / total, _LEAST_FACTOR, _MOST_FACTOR)
    return factors


def _plans(measured: _Measured, budget: float) -> dict[str, list[int]]:
    plans = {
        "predicted": cheapest(measured.predicted, measured.bits, budget),
        "corrected": cheapest(measured.corrected, measured.bits, budget),
    }
    for at, form in enumerate(measured.forms):
        if measured.within(measured.uniform(at), budget):
            plans[f"uniform {form.name}"] = measured.uniform(at)
    return plans


def _curve(measured: _Measured, points: int) -> Iterator[CurvePoint]:
    """Yield uniform formats, and allocations at budgets between them, on report."""
    session, bits, weights = measured.session, measured.bits, measured.weights
    report = session.report

    def point(kind: Literal["uniform", "allocated"], name: str, plan: Sequence[int]) -> CurvePoint:
        losses = measured.on_report(plan)
        return CurvePoint(
            kind=kind,
            name=name,
            bits_per_weight=bits_of(plan, bits) / weights,
            loss=report.mean_of(losses),
            damage=session.gain(losses, report.losses).interval(),
        )

    for at, form in enumerate(measured.forms):
        yield point("uniform", form.name, measured.uniform(at))
    totals = [bits_of(measured.uniform(at), bits) for at in range(len(measured.forms))]
    largest = max(total for total, form in zip(totals, measured.forms, strict=True) if not isinstance(form, Dense))
    for share in np.linspace(0, 1, points + 2)[1:-1]:
        budget = min(totals) + share * (largest - min(totals))
        yield point("allocated", f"{budget / weights:.2f} bits", cheapest(measured.corrected, bits, budget))


def _lines(measured: _Measured, plan: Sequence[int]) -> Iterator[AllocatedLayer]:
    forms, damage, plain = measured.forms, measured.corrected, measured.predicted
    total = float(sum(damage[number, at] for number, at in enumerate(plan))) or 1.0
    factors = np.divide(damage, plain, out=np.ones_like(damage), where=plain > 0)
    for number, (group, at) in enumerate(zip(measured.groups, plan, strict=True)):
        for member in group.members:
            predicted = {form.name: member.predicted[f] * float(factors[number, f]) for f, form in enumerate(forms)}
            linear, weights = member.linear, member.linear.weight().numel()
            yield AllocatedLayer(
                name=linear.name,
                parameter=linear.name.rpartition(".")[0] if linear.is_expert else None,
                block=group.block,
                group=number,
                format=forms[at].name,
                bits_per_weight=member.bits[at] / weights,
                weights=weights,
                predicted=predicted,
                share=predicted[forms[at].name] / total,
                fit_tokens=member.tokens,
            )
