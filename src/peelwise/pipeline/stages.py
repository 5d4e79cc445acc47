"""The stages of an audit after the model's own losses are known. Each leaves its result in the findings."""

from __future__ import annotations

from dataclasses import replace

from peelwise.model.splice import spliced
from peelwise.pipeline.bench import WITHOUT, Bench
from peelwise.pipeline.findings import Findings
from peelwise.pipeline.refine import Refined, take_round, unrefined
from peelwise.pipeline.sweep import Direction, Targets, sweep

# How many evaluations of the select loss a round takes as a rule, both directions together, to estimate its time.
_USUAL_EVALUATIONS = 5


def first_sweep(bench: Bench, findings: Findings, *, null: Targets | None = None) -> bool:
    """Make the proposals of all blocks, linearised at the model as it stands: the free ranking.

    It goes down from the last block, and ends early only when the whole budget is spent.

    Args:
        bench: model and traces.
        findings: gets the proposals.
        null: targets of the shuffled control, whose proposals are made in the same pass, from the same sums of inputs.

    Returns whether every block was reached.
    """
    with bench.clock.stage("statistics of all blocks"):
        findings.proposals, *others = sweep(
            bench.runner,
            bench.fit,
            bench.select,
            targets=[None] if null is None else [None, null],
            after_block=lambda done: bench.clock.tell(done, len(bench.runner.blocks)),
            keep_going=lambda: bench.clock.left > 0,
        )
        findings.shuffled_proposals = others[0] if others else None
    return len(findings.proposals) == len(bench.runner.blocks)


def joint_rounds(bench: Bench, findings: Findings, *, rounds: int, share: float) -> bool:
    """Refine all blocks together, round after round, while select improves and the time share lasts.

    Args:
        bench: model and traces.
        findings: ``composed`` is replaced after each round.
        rounds: most rounds.
        share: part of the whole budget after which no further round is begun.

    Returns whether the rounds ended by themselves.
    """
    state = unrefined(bench.select)
    output_changes: dict[Direction, float] = {}
    proposals = findings.proposals
    for number in range(rounds):
        with bench.clock.stage("joint rounds"):
            fit, select = bench.fit, bench.select
            if number > 0:
                if not _affordable_round(bench, share):
                    return False
                with spliced(state.changes):
                    fit, select = bench.runner.refreshed(fit), bench.runner.refreshed(select)
                    (proposals,) = sweep(
                        bench.runner,
                        fit,
                        select,
                        after_block=lambda done: bench.clock.tell(done, len(bench.runner.blocks)),
                    )
            bench.clock.tell(number + 1, rounds)
            better = take_round(bench.runner, bench.select, state, proposals, output_changes=output_changes)
            if better is None:
                break
            with spliced(better.changes):
                losses = bench.runner.losses_from(bench.report, 0)
            state = findings.composed = replace(better, report_losses=losses)
    return True


def leave_one_out(bench: Bench, findings: Findings, *, share: float) -> bool:
    """Measure what only each block gives: the composed witness without it, on report, most energy first.

    Returns whether every block was measured before ``share`` of the time left was used.
    """
    composed = findings.composed
    if composed is None:
        return True
    runner, clock = bench.runner, bench.clock
    tokens = float(bench.report.tokens.sum())
    stop = clock.elapsed + share * max(clock.left, 0.0)
    with clock.stage(WITHOUT):
        with spliced(composed.changes):
            refined = runner.refreshed(bench.report)
        order = by_energy(findings)
        for done, index in enumerate(order):
            clock.tell(done, len(order))
            needed = bench.seconds_for(bench.share_from(index) * tokens)
            if clock.elapsed + needed > stop:
                return False
            own = set(runner.blocks[index].linears)
            # Blocks below are already in the cached station; only those from here on are run.
            above = {m for block in runner.blocks[index:] for m in block.linears} - own
            with spliced({m: change for m, change in composed.changes.items() if m in above}):
                losses = runner.losses_from(refined, index)
            findings.without[index] = losses
    return True


def refine_alone(bench: Bench, findings: Findings, *, rounds: int) -> bool:
    """Refine blocks by themselves, the most promising first, one round each before anybody's next.

    Returns whether every block was refined until select stopped improving or ``rounds`` were taken.
    """
    output_changes: dict[Direction, float] = {}
    open_blocks = _promising(findings)
    with bench.clock.stage("refining blocks alone"):
        for number in range(rounds):
            still = []
            for done, index in enumerate(open_blocks):
                bench.clock.tell(done, len(open_blocks))
                if not bench.clock.affords(_alone_seconds(bench, index, number)):
                    return False
                better = _alone_round(bench, findings, index, output_changes)
                if better is not None:
                    findings.alone[index] = better
                    still.append(index)
                elif number == 0:
                    # No step helped on select: the witness is the block as it stands, and it gains nothing.
                    findings.alone[index] = replace(unrefined(bench.select, index), report_losses=bench.report.losses)
            open_blocks = sorted(still, key=lambda i: findings.alone[i].select_loss)
    return True


def by_energy(findings: Findings) -> list[int]:
    """Return block indices, most natural energy first: where the fault most often is (docs/truth.md)."""
    return sorted(findings.proposals, key=lambda i: -findings.proposals[i].ranking)


def _promising(findings: Findings) -> list[int]:
    """Blocks by what the composed witness lost without them, then by energy."""
    composed = findings.composed
    order = by_energy(findings)
    if composed is None or composed.report_losses is None:
        return order
    whole = float(composed.report_losses.sum())
    return sorted(order, key=lambda i: whole - float(findings.without[i].sum()) if i in findings.without else 0.0)


def _alone_round(
    bench: Bench, findings: Findings, index: int, output_changes: dict[Direction, float]
) -> Refined | None:
    before = findings.alone.get(index) or unrefined(bench.select, index)
    proposals = {index: findings.proposals[index]}
    if before.rounds:
        with spliced(before.changes):
            fit = bench.runner.refreshed(bench.fit, index)
            select = bench.runner.refreshed(bench.select, index)
            (proposals,) = sweep(bench.runner, fit, select, only=[index])
    better = take_round(bench.runner, bench.select, before, proposals, output_changes=output_changes, evaluations=6)
    if better is None:
        return None
    with spliced(better.changes):
        losses = bench.runner.losses_from(bench.report, index)
    return replace(better, report_losses=losses)


def _alone_seconds(bench: Bench, index: int, number: int) -> float:
    share = bench.share_from(index)
    select, report = float(bench.select.tokens.sum()), float(bench.report.tokens.sum())
    seconds = bench.seconds_for(share * (_USUAL_EVALUATIONS * select + report))
    if number == 0:
        return seconds
    sums, _ = bench.clock.stages["statistics of all blocks"]
    again = bench.seconds_for(4 * share * (select + float(bench.fit.tokens.sum())))
    return seconds + again + sums / len(bench.runner.blocks)


def _affordable_round(bench: Bench, share: float) -> bool:
    clock = bench.clock
    seconds, _ = clock.stages["statistics of all blocks"]
    evaluations = bench.seconds_for(_USUAL_EVALUATIONS * float(bench.select.tokens.sum()))
    return clock.elapsed + seconds + evaluations <= share * clock.budget
