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

import numpy as np
from numpy.typing import NDArray
from torch import nn

from peelwise.engine.clock import Clock, Watcher
from peelwise.engine.curvature import output_curvatures
from peelwise.engine.fitting import check_fits
from peelwise.engine.in_order import few_tokens
from peelwise.engine.opening import checked_blocks
from peelwise.engine.provenance import Setup, model_record, versions
from peelwise.engine.session import LOSSES, Changes, ReportSession
from peelwise.errors import FormatError
from peelwise.formats.base import Format
from peelwise.formats.dense import Dense
from peelwise.model.fingerprint import identify
from peelwise.model.guard import untouched
from peelwise.model.layers import LinearLayer, device_of
from peelwise.model.runner import Runner
from peelwise.model.selfcheck import self_check
from peelwise.model.trace import Trace
from peelwise.probe.probe import Probe
from peelwise.records.allocation import AllocatedLayer, AllocationRecord, CurvePoint, Interaction
from peelwise.records.base import note
from peelwise.references.allocation import bits_of, cheapest
from peelwise.tasks.allocate.groups import Group, bits_in, groups_of, is_asked
from peelwise.tasks.allocate.settings import AllocateSettings

# A block's measured damage over its predicted one is taken within these bounds: few tokens measure small ones badly.
_LEAST_FACTOR, _MOST_FACTOR = 0.2, 5.0


def run_allocate(
    model: nn.Module,
    name: str,
    source: str | None,
    probe: Probe,
    settings: AllocateSettings,
    watcher: Watcher | None = None,
) -> AllocationRecord:
    """Find the format of every linear layer under a budget of bits, and leave the model exactly as it was.

    Args:
        model: the parent.
        name, source: for the record.
        probe: fit makes codes and predictions, select corrects and chooses, report gives every number shown.
        settings: budget and formats.
        watcher: told about progress.

    Raises:
        FormatError: If the budget is below the smallest formats, or a format does not go with a layer.
        UnsupportedModelError: If the architecture cannot be measured.
    """
    blocks, forms = checked_blocks(model, probe), settings.parsed_formats()
    wanted = [linear for block in blocks for linear in block.linears if is_asked(linear)]
    if not wanted:
        raise FormatError("No linear layer is left to quantise inside the blocks. Give another model.")
    for linear in wanted:
        for form in forms:
            check_fits(linear, form, wanted, "--formats")
    _check_budget(wanted, forms, settings.bits)
    with untouched(model):
        runner = Runner(model, blocks, micro_batch_tokens=settings.micro_batch_tokens)
        clock = Clock(math.inf, runner.work, watcher)
        with clock.stage(LOSSES):
            notes = self_check(runner, probe.fit)
            fit, select, report = (runner.trace(part) for part in (probe.fit, probe.select, probe.report))
        session = ReportSession(runner, report)
        with clock.stage("curvature"):
            curvatures = output_curvatures(runner, fit, set(wanted))
            if curvatures is None:
                notes = (*notes, note("no-curvature"))
        with clock.stage("codes"):
            groups = list(groups_of(runner, (fit, select), forms, curvatures or {}, clock))
        bits = np.array([group.bits for group in groups])
        weights = sum(group.weights for group in groups)
        with clock.stage("block-formats"):
            single = _single_damages(session, select, groups, forms, clock)
        plain = np.array([group.predicted for group in groups])
        damage = plain * _factors(groups, plain, single, in_nats=curvatures is not None)
        with clock.stage("codes-losses"):
            plans = _plans(forms, (plain, damage), bits, settings.bits * weights)
            judged = {key: _on_select(session, select, groups, forms, plan) for key, plan in plans.items()}
            chosen = min(judged, key=lambda key: judged[key])
            curve = list(_curve(session, groups, forms, damage, bits, weights, settings.points))
            losses = session.losses(report, _changes(groups, forms, plans[chosen]))
            uniform = {
                form.name: session.gain(session.losses(report, _changes(groups, forms, [at] * len(groups))), losses)
                for at, form in enumerate(forms)
                if bits_of([at] * len(groups), bits) <= settings.bits * weights * (1 + 1e-9)
            }
        cost = clock.record(probe.fit.tokens + probe.select.tokens + probe.report.tokens, device_of(model))
    plan = plans[chosen]
    return AllocationRecord(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=model_record(Setup(model, blocks, name, source, identify(model), {}, probe.seed)),
        probe=probe.record(),
        budget_bits=settings.bits,
        bits_per_weight=bits_of(plan, bits) / weights,
        chosen=chosen,
        formats=tuple(form.name for form in forms),
        parent_loss=report.mean,
        damage=session.gain(losses, report.losses).interval(),
        layers=tuple(_lines(groups, forms, plan, damage, plain)),
        curve=tuple(sorted(curve, key=lambda point: point.bits_per_weight)),
        better_than={form: gain.interval() for form, gain in uniform.items()},
        interaction=Interaction(
            sum_of_single=float(sum(damage[number, at] for number, at in enumerate(plan))),
            joint=judged[chosen] - select.mean,
        ),
        cost=cost,
        notes=(*notes, *few_tokens((m.linear, m.tokens) for group in groups for m in group.members)),
        settings=settings.plain(),
        seed=probe.seed,
        versions=versions(),
    )


def _changes(groups: Sequence[Group], forms: Sequence[Format], plan: Sequence[int]) -> Changes:
    return {
        linear: change
        for group, at in zip(groups, plan, strict=True)
        for linear, change in group.changes(at, forms[at]).items()
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
    session: ReportSession, select: Trace, groups: Sequence[Group], forms: Sequence[Format], clock: Clock
) -> dict[tuple[int, int], float]:
    """Return for each block and format what the block in it costs on select, nats per token."""
    blocks, found = sorted({group.block for group in groups}), {}
    for done, block in enumerate(blocks):
        clock.tell(done, len(blocks))
        for at, form in enumerate(forms):
            changes = {m: c for g in groups if g.block == block for m, c in g.changes(at, form).items()}
            found[block, at] = select.mean_of(session.losses(select, changes, start=block)) - select.mean
    return found


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


def _plans(
    forms: Sequence[Format],
    damages: tuple[NDArray[np.float64], NDArray[np.float64]],
    bits: NDArray[np.float64],
    budget: float,
) -> dict[str, list[int]]:
    plans = {
        "predicted": cheapest(damages[0], bits, budget),
        "corrected": cheapest(damages[1], bits, budget),
    }
    for at, form in enumerate(forms):
        uniform = [at] * len(bits)
        if bits_of(uniform, bits) <= budget * (1 + 1e-9):
            plans[f"uniform {form.name}"] = uniform
    return plans


def _on_select(
    session: ReportSession, select: Trace, groups: Sequence[Group], forms: Sequence[Format], plan: Sequence[int]
) -> float:
    return select.mean_of(session.losses(select, _changes(groups, forms, plan)))


def _curve(
    session: ReportSession,
    groups: Sequence[Group],
    forms: Sequence[Format],
    damage: NDArray[np.float64],
    bits: NDArray[np.float64],
    weights: int,
    points: int,
) -> Iterator[CurvePoint]:
    """Yield uniform formats, and allocations at budgets between them, on report."""
    report = session.report

    def point(kind: str, name: str, plan: Sequence[int]) -> CurvePoint:
        losses = session.losses(report, _changes(groups, forms, plan))
        return CurvePoint(
            kind="uniform" if kind == "uniform" else "allocated",
            name=name,
            bits_per_weight=bits_of(plan, bits) / weights,
            loss=report.mean_of(losses),
            damage=session.gain(losses, report.losses).interval(),
        )

    for at, form in enumerate(forms):
        yield point("uniform", form.name, [at] * len(groups))
    totals = [bits_of([at] * len(groups), bits) for at in range(len(forms))]
    largest = max([total for total, form in zip(totals, forms, strict=True) if not isinstance(form, Dense)])
    for share in np.linspace(0, 1, points + 2)[1:-1]:
        budget = min(totals) + share * (largest - min(totals))
        yield point("allocated", f"{budget / weights:.2f} bits", cheapest(damage, bits, budget))


def _lines(
    groups: Sequence[Group],
    forms: Sequence[Format],
    plan: Sequence[int],
    damage: NDArray[np.float64],
    plain: NDArray[np.float64],
) -> Iterator[AllocatedLayer]:
    total = float(sum(damage[number, at] for number, at in enumerate(plan))) or 1.0
    factors = np.divide(damage, plain, out=np.ones_like(damage), where=plain > 0)
    for number, (group, at) in enumerate(zip(groups, plan, strict=True)):
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
