"""An anatomy, study by study, each to its end: its budget is spent before that on all but small models."""

from __future__ import annotations

from peelwise.records.plan import Shape
from peelwise.tasks.plan import work
from peelwise.tasks.plan.memory import Memory
from peelwise.tasks.plan.stages import Loops, Probe, Stage, alone_again, half_of, look, opening
from peelwise.tasks.plan.work import Part, Work

_SCALES = 13  # factors that are tried on select: a grid, then halvings beside the best
_LOOK_EVERY = 5  # steps of a training
_KINDS_OF_GRAMS = 3  # of the matrices, of independent ones, and once more for predictions


def anatomy(shape: Shape, probe: Probe, memory: Memory, loops: Loops) -> list[Stage]:
    """Return the stages of an anatomy with all studies."""
    fit, select, report = probe.parts
    L, half, below = shape.depth, half_of(shape), (shape.depth - 1) / (2 * shape.depth)
    seen = Part(fit.tokens + select.tokens, fit.length, fit.micro_batch_tokens)
    on_report, on_select = work.forward(shape, report, half), work.forward(shape, select, half)
    block = memory.changes(1 / L) + memory.splice() / L
    logits = memory.logits(report.tokens)
    # Skipped and its mean added, from the block behind it; then silent attention, silent MLP, the mean of neighbours.
    ablated = (work.forward(shape, report, below) * 2 + on_report * 3) * L
    grams = Work(_KINDS_OF_GRAMS * 2 * L * shape.linear_weights)
    bends = (on_select * _SCALES + on_report * (1 + loops.bends)) * L + _low_rank(shape)
    again = alone_again(shape, probe, loops, 1) + (on_report + on_select) * L
    training = (_step(shape, memory, half) + on_select * (1 / _LOOK_EVERY)) * (L * loops.trained_steps)
    return [
        *opening(shape, probe, memory),
        Stage("ablation", ablated, logits + block),
        Stage("predictability", grams + on_report * L, logits + block),
        *look(shape, probe, seen, memory),
        Stage("bending", bends, logits + 2 * block),
        Stage("recovery", again + training, _trained(shape, memory, block)),
    ]


def _low_rank(shape: Shape) -> Work:
    """Return what low rank takes beside evaluations: a decomposition with vectors, and one product as a rule."""
    total = 0.0
    for group in shape.groups:
        for o in group.outputs:
            r = min(o, group.inputs)
            total += group.count * (6 * o * group.inputs * r + 20 * r**3 + 2 * o * group.inputs * r)
    return Work(total)


def _step(shape: Shape, memory: Memory, half: float) -> Work:
    """Return one step on a micro-batch: forward and back through the blocks from one on, and the head."""
    one = Part(memory.micro_batch, 1, memory.micro_batch)
    back = Work(2 * one.tokens * shape.head_weights)
    return work.forward(shape, one, half) + work.block_gradients(shape, one) * half + back


def _trained(shape: Shape, memory: Memory, block: float) -> float:
    """Return a round of one block, or its training: the graph of all blocks behind it, gradients and Adam's moments."""
    one_round = memory.sums(1) + memory.proposals(2) / shape.depth
    graph = memory.activations(memory.micro_batch) * shape.depth + memory.logits_back(memory.micro_batch)
    return block + max(one_round, graph + memory.changes(4 / shape.depth))
