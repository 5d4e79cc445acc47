"""Quantising and checking what is quantised, stage by stage."""

from __future__ import annotations

from peelwise.records.plan import Shape
from peelwise.tasks.plan import codes, work
from peelwise.tasks.plan.memory import Memory
from peelwise.tasks.plan.stages import Loops, Probe, Stage, identity, self_checks
from peelwise.tasks.plan.work import Part, Work

MOST_CURVATURE = 2 * 2**30  # bytes of what the loss minds in all outputs; where it is more it is left out
_STEPS_TOKENS = 2_048  # of report, that steps of layers are shown on


def quantise(shape: Shape, probe: Probe, memory: Memory, loops: Loops) -> list[Stage]:
    """Return the stages of quantising every layer inside of the blocks, from nothing."""
    fit, select, report = probe.parts
    seen = Part(fit.tokens + select.tokens + report.first(_STEPS_TOKENS).tokens, fit.length, fit.micro_batch_tokens)
    weighed = memory.curvatures() <= MOST_CURVATURE
    losses = self_checks(shape, probe) + sum((work.forward(shape, part) for part in probe.parts), Work())
    found = [identity(memory), Stage("losses", losses, memory.logits(memory.tokens))]
    if weighed:
        found.append(_curvature(shape, fit, memory))
    walk = codes.walked(shape, seen, hooked=memory.hooked)
    solved = codes.in_order(shape, 0, loops.sweeps, weighed=weighed, shown=True)
    kept = memory.changes() + weighed * memory.curvatures_kept() + memory.own_stations(seen.tokens)
    found.append(Stage("codes", walk + solved, kept + memory.splice() / shape.depth + memory.layer_codes()))
    compared = work.forward(shape, report, hooked=memory.hooked) * 2
    last = memory.changes(2) + weighed * memory.curvatures_kept() + memory.splice() + memory.logits(report.tokens)
    return [*found, Stage("codes-losses", compared, last)]


def quantcheck(shape: Shape, probe: Probe, memory: Memory, loops: Loops) -> list[Stage]:
    """Return the stages of comparing a quantised model with its parent; both are in memory, each as large."""
    fit, select, report = probe.parts
    weighed = memory.curvatures() <= MOST_CURVATURE
    parent = sum((work.forward(shape, part) for part in probe.parts), Work())
    losses = self_checks(shape, probe) * 2 + parent + work.forward(shape, select) + work.forward(shape, report)
    inputs = sum((work.forward(shape, part, heads=0.0) for part in probe.parts), Work())
    sums = work.Work(sum(g.count * work.gram(p.tokens * g.routed, g.inputs) for g in shape.groups for p in probe.parts))
    both = Part(fit.tokens + select.tokens, fit.length, fit.micro_batch_tokens)
    walk = codes.walked(shape, both, hooked=memory.hooked) + work.forward(shape, fit)
    solved = codes.in_order(shape, 1, loops.sweeps, weighed=weighed, shown=False)
    tried = work.forward(shape, select, hooked=memory.hooked) * 2 + work.forward(shape, report, hooked=memory.hooked)
    own = memory.changes(2) + weighed * memory.curvatures()
    alone = memory.changes() + weighed * memory.curvatures() + _alone(memory)
    return [
        identity(memory, models=2),
        Stage("losses", losses, memory.logits(memory.tokens)),
        *([_curvature(shape, fit, memory)] if weighed else []),
        Stage("best-weights", inputs + sums + codes.alone(shape, loops.sweeps), alone),
        Stage("codes", walk + solved, own + memory.splice() / shape.depth + memory.layer_codes()),
        Stage("best-weights-losses", tried, memory.changes(2) + memory.splice() + memory.logits(report.tokens)),
    ]


def _curvature(shape: Shape, fit: Part, memory: Memory) -> Stage:
    back = work.head_gradients(shape, fit) + work.block_gradients(shape, fit) + work.sums(shape, fit)
    return Stage("curvature", back, memory.curvatures_kept() + memory.sums(1))


def _alone(memory: Memory) -> float:
    """Sums of the inputs of one block on three parts, and the codes of one layer."""
    inputs, _, _ = memory.numbers_in_sums
    return 3 * 4 * inputs + 8 * inputs + memory.layer_codes()
