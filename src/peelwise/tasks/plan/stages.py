"""Checks, audits and comparisons, stage by stage: what each computes, reads and keeps in memory."""

from __future__ import annotations

from dataclasses import dataclass

from peelwise.records.plan import Shape
from peelwise.tasks.plan import work
from peelwise.tasks.plan.memory import Memory
from peelwise.tasks.plan.work import Part, Work

SHARES = (0.5, 0.15, 0.35)  # of fit, select and report
LEAST_BLOCKS = 5  # that a look over depth needs
_SCREENED, _FACTORS, _SCREEN_TOKENS = 5, 3, 512  # blocks that factors are tried on, per branch, on so many tokens
_BRANCHES = 2
_MOST_BYTES = 2 * 2**30  # of a head that is fitted from nothing
_CANDIDATES, _SEARCHED = 8, 6  # parts of a block that factors are put on, and how many are tried on each


@dataclass(frozen=True)
class Probe:
    """The three parts of a probe."""

    fit: Part
    select: Part
    report: Part

    @staticmethod
    def of(tokens: float, length: int, micro_batch_tokens: int) -> Probe:
        """Return the parts of so many tokens."""
        return Probe(*(Part(share * tokens, length, micro_batch_tokens) for share in SHARES))

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        """All three."""
        return self.fit, self.select, self.report


@dataclass(frozen=True)
class Loops:
    """How often what depends on the model is done; the defaults are what it takes as a rule.

    Attributes:
        named: blocks unlike their neighbours, on which factors are searched for.
        joint_rounds, solo_rounds: rounds of an audit.
        evaluations: of the select loss in a round, both directions together.
        compared_blocks: blocks whose layers a comparison exchanges one by one.
        head_steps, blank_steps: of the head's fit, and of that of a head without blocks.
        sweeps: of coordinate descent on a layer's codes, from its two beginnings together.
        bends: ways and strengths that a block is bent by until it costs too much.
        trained_steps: of a damaged block.
    """

    named: int = 0
    joint_rounds: int = 4
    solo_rounds: int = 4
    evaluations: int = 5
    compared_blocks: int = 3
    head_steps: int = 30
    blank_steps: int = 30
    sweeps: float = 6.0
    bends: float = 20.0
    trained_steps: float = 40.0


@dataclass(frozen=True)
class Stage:
    """A stage by name, its work, and the bytes that it keeps beside what is there throughout."""

    name: str
    work: Work
    memory: float


def check_weights(shape: Shape, memory: Memory) -> list[Stage]:
    """Return the stages of a check without text: every weight is read three times, and spectra are computed."""
    return [identity(memory), Stage("weight-signals", work.spectra(shape), memory.spectrum())]


def check(shape: Shape, probe: Probe, memory: Memory, loops: Loops) -> list[Stage]:
    """Return the stages of a check with text."""
    seen = Part(probe.fit.tokens + probe.select.tokens, probe.fit.length, probe.fit.micro_batch_tokens)
    found = [*opening(shape, probe, memory), *look(shape, probe, seen, memory)]
    if any(group.expert for group in shape.groups):  # each block once more, to see which experts are given what
        again = work.forward(shape, seen, heads=0.0).operations
        found.append(Stage("experts", Work(again, blocks=1.0), 0.0))
    return [*found, *_witnesses(shape, probe, memory, loops)]


def audit(shape: Shape, probe: Probe, memory: Memory, loops: Loops, processes: int = 1) -> list[Stage]:
    """Return the stages of an audit with its controls on text that the model was trained on, without a time limit.

    Args:
        shape: the model.
        probe: what one process has of the text.
        memory: of one process.
        loops: how often what depends on the model is done.
        processes: among which solves and signals of weights are dealt out.
    """
    fit, select, report = probe.parts
    L, half = shape.depth, half_of(shape)
    found = [*opening(shape, probe, memory), *look(shape, probe, select, memory, processes)]
    both = memory.proposals(4)  # two directions, and two for shuffled targets
    swept = _swept(shape, fit, select, targets=2, memory=memory)
    found.append(Stage("statistics", swept, both + memory.sums(2)))
    found.append(Stage("proposals", work.proposals(shape, targets=2) * (1 / processes), both + memory.sums(2)))
    ablation = work.forward(shape, report, (L - 1) / 2, heads=L)
    found.append(Stage("ablation", ablation, both + memory.logits(report.tokens)))
    found.append(_joint(shape, probe, memory, loops, processes))
    composed = memory.changes()
    out = work.forward(shape, report, hooked=memory.hooked)
    out += work.forward(shape, report, (L + 1) / 2, heads=L, hooked=memory.hooked)
    found.append(Stage("leave-one-out", out, both + composed + memory.splice() + memory.logits(report.tokens)))
    step = _step(shape, select, report, loops.evaluations, memory.hooked)
    found.append(
        Stage(
            "shuffled-control",
            step,
            both + composed + memory.changes(2) + memory.splice() + memory.logits(report.tokens),
        )
    )
    found.append(_untrained(shape, probe, memory, loops, processes))
    kept = memory.proposals() + composed
    fits = work.head_fit(shape, fit, select, report, loops.head_steps)
    if memory.blank_head <= _MOST_BYTES:  # else a head without blocks is left out
        fits += work.head_fit(shape, fit, select, report, loops.blank_steps, blank=True)
    found.append(Stage("head", fits, kept + memory.head(memory.tokens)))
    first = (work.forward(shape, select, half, 1.0) * loops.evaluations + work.forward(shape, report, half, 1.0)) * L
    again = alone_again(shape, probe, loops, processes) * max(loops.solo_rounds - 1, 0)
    alone = memory.changes() + memory.proposals(2) / L + memory.splice() / L + memory.logits(report.tokens)
    more = memory.sums(1) if loops.solo_rounds > 1 else 0.0
    found.append(Stage("solo-rounds", first + again, kept + max(alone, memory.changes() + more)))
    return found


def compare(shape: Shape, probe: Probe, memory: Memory, loops: Loops) -> list[Stage]:
    """Return the stages of a comparison in which every tensor has changed, without a time limit.

    Both models are in memory. What a change is looked for among kinds, up to the last, which takes four spectra of a
    matrix and two comparisons of all its rows and columns.
    """
    report, L, half = probe.report, shape.depth, half_of(shape)
    one = Part(report.length, report.length, report.micro_batch_tokens)
    whole = work.forward(shape, report)
    from_each = work.forward(shape, report, half) * L
    # The embedding with all behind it, each block, then norm and head.
    exchanged = whole + from_each + work.forward(shape, report, share=0.0) * 2
    # Of the blocks whose exchange matters most, every layer.
    layers = sum(len(group.outputs) * group.count for group in shape.groups) / L
    by_layer = work.forward(shape, report, half) * (loops.compared_blocks * layers)
    # Either way up to the first part of the other model is known; the last step is that model.
    path = exchanged * 2 + whole * -1
    traced = (work.forward(shape, one) * 6 + whole) * 2
    # Old code with old and with new weights at the stations of the new one; logits of four pairs of ends.
    outputs = work.forward(shape, report, heads=0.0) * 2 + work.forward(shape, report, share=0.0) * 6
    logits = memory.logits(report.tokens)
    return [
        identity(memory, models=2),
        Stage("changes", work.changes(shape), memory.changes_of_kind()),
        Stage("losses", traced, logits),
        Stage("outputs", outputs, 2 * logits),
        Stage("repairs", exchanged, logits),
        Stage("breaks", exchanged, logits),
        Stage("layers", by_layer, logits),
        Stage("swap-path", path, logits),
        Stage("mended", whole, logits),
    ]


def identity(memory: Memory, models: int = 1) -> Stage:
    """Return what every task begins with: it is opened, looked at for NaN, and hashed."""
    return Stage("identity", Work(whole=2.0 * models), memory.opening)


def opening(shape: Shape, probe: Probe, memory: Memory) -> list[Stage]:
    """Return what is checked of a model first, on one sequence, and a pass over all tokens."""
    losses = sum((work.forward(shape, part) for part in probe.parts), Work())
    largest = memory.activations(probe.fit.length) * shape.depth
    return [
        identity(memory),
        Stage("self-checks", self_checks(shape, probe), largest),
        Stage("losses", losses, memory.logits(memory.tokens)),
    ]


def self_checks(shape: Shape, probe: Probe) -> Work:
    """Return what is checked of a model first, on one sequence.

    It is traced twice and replayed, runs three times with other tokens, once and once in gradients, goes back as a
    whole and block by block, and runs three times for a change in hooks and in weights.
    """
    one = Part(probe.fit.length, probe.fit.length, probe.fit.micro_batch_tokens)
    back = work.block_gradients(shape, one) + work.head_gradients(shape, one)
    return work.forward(shape, one) * 6 + work.forward(shape, one, heads=0.0) * 5 + back * 2


def look(shape: Shape, probe: Probe, seen: Part, memory: Memory, processes: int = 1) -> list[Stage]:
    """Return signals of weights and of a pass, and a few factors on the blocks that stand out."""
    few = probe.select.first(_SCREEN_TOKENS)
    tried = min(_SCREENED, shape.depth) * _BRANCHES * _FACTORS if shape.depth >= LEAST_BLOCKS else 0
    screening = work.forward(shape, few, half_of(shape)) * tried
    return [
        Stage("weight-signals", work.spectra(shape) * (1 / processes), memory.spectrum()),
        Stage("pass-signals", work.pass_signals(shape, seen), memory.pass_signals(seen.tokens)),
        Stage("gain-witnesses", screening, memory.logits(few.tokens) + memory.one_change),
    ]


def _witnesses(shape: Shape, probe: Probe, memory: Memory, loops: Loops) -> list[Stage]:
    if not loops.named:
        return []
    half = half_of(shape)
    ablation = work.forward(shape, probe.report, half) * loops.named
    searches = work.forward(shape, probe.select, half) * _SEARCHED + work.forward(shape, probe.report, half)
    return [
        Stage("ablation", ablation, memory.logits(probe.report.tokens)),
        Stage(
            "factors", searches * (loops.named * _CANDIDATES), memory.logits(probe.report.tokens) + memory.one_change
        ),
    ]


def _swept(
    shape: Shape, fit: Part, select: Part, targets: int, two_sided: bool = True, memory: Memory | None = None
) -> Work:
    """Return a sweep: gradients of fit (for each set of targets) and of select, and the sums of both.

    Blocks are run as often as their sums are made in parts, where ``memory`` is that of a stream.
    """
    passes = len(memory.parts_of_sums(targets, two_sided)) if memory is not None and memory.streamed else 1
    total = (
        work.head_gradients(shape, fit) * targets
        + work.head_gradients(shape, select)
        + (work.block_gradients(shape, fit, targets) + work.block_gradients(shape, select)) * passes
        + work.sums(shape, fit, targets, two_sided)
        + work.sums(shape, select, 1, two_sided)
    )
    return Work(total.operations, blocks=1.0, heads=1.0)  # fit and select go through a block in turn


def _joint(shape: Shape, probe: Probe, memory: Memory, loops: Loops, processes: int) -> Stage:
    """Return the rounds of all blocks together: the first uses the proposals of the sweep, each further one its own."""
    fit, select, report = probe.parts
    tried = _step(shape, select, report, loops.evaluations, memory.hooked)
    again = work.forward(shape, fit, hooked=memory.hooked) + work.forward(shape, select, hooked=memory.hooked)
    again += _swept(shape, fit, select, 1, memory=memory)
    again += work.proposals(shape) * (1 / processes)
    rounds, more = loops.joint_rounds, max(loops.joint_rounds - 1, 0)
    held = memory.proposals(4) + memory.changes(2) + memory.splice() + memory.logits(report.tokens)
    if more:
        held += memory.changes() + memory.proposals()
    return Stage("joint-rounds", tried * rounds + again * more, held)


def _untrained(shape: Shape, probe: Probe, memory: Memory, loops: Loops, processes: int) -> Stage:
    """Return the same architecture at initialisation: a third of fit and select, one direction, one joint step."""
    fit, select, report = probe.parts
    fit, select = (Part(p.tokens / 3, p.length, p.micro_batch_tokens) for p in (fit, select))
    own = sum((work.forward(shape, part) for part in (fit, select, report)), Work())
    own += _swept(shape, fit, select, 1, two_sided=False)
    own += work.proposals(shape, 1, two_sided=False) * (1 / processes)
    own += _step(shape, select, report, max(loops.evaluations // 2, 1), memory.hooked)
    fresh = memory.weights + memory.stations
    held = memory.proposals(3) + memory.changes(2) + memory.splice() + memory.logits(report.tokens)
    return Stage("untrained-control", own, fresh + held)


def _step(shape: Shape, select: Part, report: Part, evaluations: int, hooked: bool) -> Work:
    """Return the search of one step on select, and its loss on report."""
    tried = work.forward(shape, select, hooked=hooked) * evaluations
    return tried + work.forward(shape, report, hooked=hooked)


def alone_again(shape: Shape, probe: Probe, loops: Loops, processes: int) -> Work:
    """Return a further round of every block by itself: gradients go down to it, and its sums are made again."""
    fit, select, report = probe.parts
    L, half = shape.depth, half_of(shape)
    through = work.forward(shape, fit, half) + work.forward(shape, select, half)
    down = (work.block_gradients(shape, fit) + work.block_gradients(shape, select)) * half
    tails = work.head_gradients(shape, fit) + work.head_gradients(shape, select)
    tried = work.forward(shape, select, half) * loops.evaluations + work.forward(shape, report, half)
    own = work.sums(shape, fit) + work.sums(shape, select) + work.proposals(shape) * (1 / processes)
    return (through + down + tails + tried) * L + own


def half_of(shape: Shape) -> float:
    """Return the share of the blocks that lie from one of them on, on average: ``(L + 1) / 2 L``."""
    return (shape.depth + 1) / (2 * shape.depth)
