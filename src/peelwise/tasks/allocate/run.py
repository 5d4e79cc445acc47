"""Which layers get how many bits: damage per layer and format is predicted, corrected block by block, and spent on.

    1. per layer and format: codes by rounding with error feedback, and what they are predicted to cost
    2. per block and format: what the block in that format really costs on select, all else in full precision
    3. an integer programme under the budget, on the predictions as they are and as corrected by 2
    4. the plan with the lowest loss on select, uniform formats within the budget among them; shown on report

Layers that share their input (queries, keys and values; gate and up) decide together: their weights are often fused.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from peelwise.engine.clock import Clock, Watcher
from peelwise.engine.curvature import output_curvatures
from peelwise.engine.in_order import Walk
from peelwise.engine.opening import checked_blocks
from peelwise.engine.provenance import Setup, model_record, versions
from peelwise.engine.session import LOSSES, Changes, ReportSession, change_to
from peelwise.errors import FormatError
from peelwise.formats.base import Encoded, Format
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
from peelwise.references.allocation import bits_of, cheapest, predicted_damage
from peelwise.references.asymmetric import InputSums, Target, coded
from peelwise.tasks.allocate.settings import AllocateSettings

# A block's measured damage over its predicted one is taken within these bounds: few tokens measure small ones badly.
_LEAST_FACTOR, _MOST_FACTOR = 0.2, 5.0
FLOAT_BITS = 16.0  # what a layer that is left alone takes per weight, as models are shipped


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that decide together, with codes and predicted damage in each format."""

    block: int
    linears: list[LinearLayer]
    codes: list[list[Encoded]]  # [formats][layers]
    predicted: list[list[float]]  # [formats][layers]
    bits: list[float]  # [formats], of all layers together

    def changes(self, at: int, form: Format) -> Changes:
        """Return what format number ``at`` changes."""
        return {
            linear: change_to(linear, form.decode(encoded))
            for linear, encoded in zip(self.linears, self.codes[at], strict=True)
        }


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
    with untouched(model):
        runner = Runner(model, blocks, micro_batch_tokens=settings.micro_batch_tokens)
        clock = Clock(math.inf, runner.work, watcher)
        with clock.stage(LOSSES):
            notes = self_check(runner, probe.fit)
            fit, select, report = (runner.trace(part) for part in (probe.fit, probe.select, probe.report))
        session = ReportSession(runner, report)
        with clock.stage("curvature"):
            wanted = {linear for block in blocks for linear in block.linears if linear.is_plain}
            curvatures = output_curvatures(runner, fit, wanted)
            if curvatures is None:
                notes, curvatures = (*notes, note("no-curvature")), {}
        with clock.stage("codes"):
            groups = list(_groups(runner, fit, select, forms, curvatures, clock))
        if not groups:
            raise FormatError("No linear layer is left to quantise inside the blocks. Give another model.")
        bits = np.array([group.bits for group in groups])
        weights = sum(linear.weight().numel() for group in groups for linear in group.linears)
        cheapest(np.zeros_like(bits), bits, settings.bits * weights)  # refuses a budget that is too small
        with clock.stage("breaks"):
            single = _single_damages(session, select, groups, forms, clock)
        plain = np.array([[sum(each) for each in group.predicted] for group in groups])
        damage = plain * _factors(groups, plain, single)
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
        notes=tuple(notes),
        settings=settings.plain(),
        seed=probe.seed,
        versions=versions(),
    )


def _groups(
    runner: Runner,
    fit: Trace,
    select: Trace,
    forms: Sequence[Format],
    curvatures: Mapping[LinearLayer, Tensor],
    clock: Clock,
) -> Iterator[Group]:
    """Yield the groups of all blocks; one group's sums are alive at a time."""
    linears = {m: m for block in runner.blocks for m in block.linears if m.is_plain}
    walk = Walk(runner, runner, linears, [fit, select], [fit, select])
    for done, block in enumerate(runner.blocks):
        clock.tell(done, len(runner.blocks))
        for group, (own, chooses) in walk.groups(block):
            codes, predicted, bits = [], [], []
            for form in forms:
                of_form = []
                for linear in group:
                    try:
                        of_form.append(_codes(linear.weight().float(), form, own, chooses))
                    except FormatError as error:
                        raise FormatError(f"{linear.name}: {error}") from error
                codes.append(of_form)
                predicted.append(
                    [
                        predicted_damage(form.decode(e) - m.weight().float(), own.zz, curvatures.get(m))
                        for m, e in zip(group, of_form, strict=True)
                    ]
                )
                bits.append(sum(_bits(form, linear) for linear in group))
            yield Group(block.index, group, codes, predicted, bits)
        walk.leave(block)


def _codes(W: Tensor, form: Format, fit: InputSums, select: InputSums) -> Encoded:
    return form.encode(W) if isinstance(form, Dense) else coded(W, Target(W), fit, select, form, max_sweeps=0).encoded


def _bits(form: Format, linear: LinearLayer) -> float:
    d_out, d_in = linear.weight().shape
    return FLOAT_BITS * d_out * d_in if isinstance(form, Dense) else form.bits(d_out, d_in)


def _changes(groups: Sequence[Group], forms: Sequence[Format], plan: Sequence[int]) -> Changes:
    return {
        linear: change
        for group, at in zip(groups, plan, strict=True)
        for linear, change in group.changes(at, forms[at]).items()
    }


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
    groups: Sequence[Group], predicted: NDArray[np.float64], single: Mapping[tuple[int, int], float]
) -> NDArray[np.float64]:
    """Return by how much the predictions of a block in a format were wrong, ``[groups, formats]``."""
    factors = np.ones_like(predicted)
    blocks = np.array([group.block for group in groups])
    for (block, at), measured in single.items():
        inside = blocks == block
        total = predicted[inside, at].sum()
        if total > 0:
            factors[inside, at] = np.clip(measured / total, _LEAST_FACTOR, _MOST_FACTOR)
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
        for i, linear in enumerate(group.linears):
            predicted = {form.name: group.predicted[f][i] * float(factors[number, f]) for f, form in enumerate(forms)}
            weights = linear.weight().numel()
            yield AllocatedLayer(
                name=linear.name,
                block=group.block,
                group=number,
                format=forms[at].name,
                bits_per_weight=_bits(forms[at], linear) / weights,
                weights=weights,
                predicted=predicted,
                share=predicted[forms[at].name] / total,
            )
