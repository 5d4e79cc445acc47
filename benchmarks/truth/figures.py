"""From measured cases to figures: pure functions of plain rows.

A case counts as a fault if it is really worse than its healthy model: the lower end of the loss increase, paired by
sequence on report, is above the default margin. What costs nothing is not a fault, whatever was done to the weights.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

from peelwise.evidence.verdict import default_margin, stands_out

Row = dict[str, Any]
_TIED = 1.96  # standard errors
_OURS = "peelwise: "  # before the names of our own statistics


def scores_of(row: Row) -> dict[str, list[float]]:
    """Return every statistic that names a block, ours first: larger means more suspicious."""
    own = {f"{_OURS}{name}": scores for name, scores in row["own"]["scores"].items() if None not in scores}
    rivals = {name: found["scores"] for name, found in row["rivals"].items() if found["scores"] is not None}
    return own | rivals


def against_depth(scores: Sequence[float]) -> list[float]:
    """Return each block's score over the median of its up to four neighbours, or less it if some are negative."""
    near = [[scores[j] for j in range(max(0, i - 2), min(len(scores), i + 3)) if j != i] for i in range(len(scores))]
    return [_over(s, statistics.median(others), scores) for s, others in zip(scores, near, strict=True)]


def against_history(scores: Sequence[float], earlier: Sequence[float]) -> list[float]:
    """Return each block's score over its own in the healthy model, or less it if some are negative."""
    both = [*scores, *earlier]
    return [_over(s, e, both) for s, e in zip(scores, earlier, strict=True)]


def _over(score: float, usual: float, all_scores: Sequence[float]) -> float:
    return score / usual if min(all_scores) > 0 else score - usual


def with_depth(row: Row) -> Row:
    """Return the case with every statistic seen against its neighbours in depth; intervals have no meaning then."""
    return _with_scores(row, {name: against_depth(scores) for name, scores in scores_of(row).items()})


def with_history(rows: Sequence[Row]) -> list[Row]:
    """Return the damaged cases whose healthy model was measured, every statistic seen against its value there."""
    key = itemgetter("family", "seed", "step")
    healthy = {key(row): scores_of(row) for row in rows if row["group"] == "healthy"}
    found = []
    for row in rows:
        before = healthy.get(key(row), {})
        scores = {n: against_history(s, before[n]) for n, s in scores_of(row).items() if n in before}
        if row["group"] == "after training" and scores:
            found.append(_with_scores(row, scores))
    return found


def _with_scores(row: Row, scores: dict[str, list[float]]) -> Row:
    own = {n.removeprefix(_OURS): s for n, s in scores.items() if n.startswith(_OURS)}
    rivals = {n: row["rivals"][n] | {"scores": s} for n, s in scores.items() if not n.startswith(_OURS)}
    return row | {"own": row["own"] | {"scores": own, "errors": {}}, "rivals": rivals}


def errors_of(row: Row, name: str) -> list[float] | None:
    """Return the standard errors of a statistic, if it has any."""
    found: list[float] | None = row["own"]["errors"].get(name.removeprefix(_OURS))
    return found


def is_fault(row: Row) -> bool:
    """Whether something is wrong with the model that costs more than the margin."""
    cost = row["cost_of_fault"]
    return cost is not None and cost["low"] > default_margin(row["own"]["loss"] - cost["mean"])


def is_first(scores: Sequence[float], block: int) -> bool:
    """Whether no other block has as large a score."""
    return all(s < scores[block] for i, s in enumerate(scores) if i != block)


def is_tied(scores: Sequence[float], errors: Sequence[float] | None, block: int) -> bool:
    """Whether the block is first, or its distance to the first is within 1.96 standard errors of both together."""
    top = max(range(len(scores)), key=lambda i: scores[i])
    if scores[block] == scores[top]:
        return is_first(scores, block)  # a score that calls all alike names nobody
    error = (errors[top] ** 2 + errors[block] ** 2) ** 0.5 if errors else 0.0
    return scores[top] - scores[block] <= _TIED * error


def is_near(scores: Sequence[float], block: int) -> bool:
    """Whether the first lies at most one block away."""
    top = max(range(len(scores)), key=lambda i: scores[i])
    return abs(top - block) <= 1 and min(scores) < scores[top]


def share_below(scores: Sequence[float], block: int) -> float:
    """Return the area under the curve of one case: the share of other blocks with a smaller score, ties half."""
    others = [s for i, s in enumerate(scores) if i != block]
    return sum((s < scores[block]) + 0.5 * (s == scores[block]) for s in others) / len(others)


def localisation(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Return for every statistic how often it names the block at fault."""
    cases = [(row, scores_of(row)) for row in rows]
    found = {}
    for name in _names(cases):
        told = [(row["block"], scores[name], errors_of(row, name)) for row, scores in cases if name in scores]
        found[name] = {
            "cases": len(told),
            "first": _mean(is_first(s, b) for b, s, _ in told),
            "first_or_tied": _mean(is_tied(s, e, b) for b, s, e in told),
            "within_one": _mean(is_near(s, b) for b, s, _ in told),
            "area_under_curve": _mean(share_below(s, b) for b, s, _ in told),
            "flagged": _mean(stands_out(s, 0.0)[b] for b, s, _ in told),
        }
    return found


def false_flags(rows: Iterable[Row]) -> dict[str, float]:
    """Return for every statistic the share of healthy models' blocks that stand out from the trend over depth."""
    cases = [(row, scores_of(row)) for row in rows]
    return {
        name: _mean(flag for _, scores in cases if name in scores for flag in stands_out(scores[name], 0.0))
        for name in _names(cases)
    }


def verdicts(rows: Iterable[Row]) -> dict[str, Any]:
    """Return how many blocks got which colour, and how many red ones a fresh text does not bear out."""
    rows = list(rows)
    colours = Counter(colour for row in rows for colour in row["own"]["verdicts"])
    red = [red_checked(row["fresh"], default_margin(row["own"]["loss"])) for row in rows if "fresh" in row]
    return {"colours": dict(colours), "red": {key: sum(each[key] for each in red) for key in ("checked", "wrong")}}


def is_finished(row: Row, healthy: Iterable[Row]) -> bool:
    """Whether this is the last step that was kept of its run."""
    return bool(row["step"] == max(other["step"] for other in healthy if other["seed"] == row["seed"]))


def only_at_fault(row: Row) -> Row:
    """Return the case with nothing but the verdict of the block at fault."""
    fresh = [e for e in row.get("fresh", []) if e.get("block") == row["block"]]
    return row | {"own": row["own"] | {"verdicts": [row["own"]["verdicts"][row["block"]]]}, "fresh": fresh}


def red_checked(fresh: Iterable[Row], margin: float = 0.0) -> dict[str, int]:
    """Return how many red blocks were measured on fresh text, and how many are shown to gain less than the margin."""
    red = [e for e in fresh if e.get("verdict") == "red"]
    return {"checked": len(red), "wrong": sum(e["fresh"] + _TIED * e["fresh_error"] < margin for e in red)}


def coverage(fresh: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return how often a 95 % interval on report agrees with the same witness's gain on fresh text.

    The fresh mean has an error of its own, which widens the interval: both errors are added in squares.
    """
    found = {}
    for what in ("composed", "alone"):
        each = [e for e in fresh if e["what"] == what]
        if each:
            found[what] = {
                "intervals": len(each),
                "covered": _mean(_agrees(e) for e in each),
                "low_end_holds": _mean(e["fresh"] + _TIED * e["fresh_error"] >= e["low"] for e in each),
                "fresh_below": _mean(e["fresh"] < _middle(e) for e in each),
            }
    return found


def _middle(e: Row) -> float:
    return (e["low"] + e["high"]) / 2


def _agrees(e: Row) -> bool:
    half = (e["high"] - e["low"]) / 2
    return abs(e["fresh"] - _middle(e)) <= (half**2 + (_TIED * e["fresh_error"]) ** 2) ** 0.5


def seconds(rows: Iterable[Row]) -> dict[str, float]:
    """Return the median seconds that a statistic takes; ours include what has to come before it."""
    taken: dict[str, list[float]] = {}
    for row in rows:
        stages = row["own"]["seconds"]
        so_far = 0.0
        for stage, of_old, names in STAGES:
            so_far += stages.get(stage, stages.get(of_old, 0.0))
            for name in names:
                if f"{_OURS}{name}" in scores_of(row):
                    taken.setdefault(f"{_OURS}{name}", []).append(so_far)
        for name, found in row["rivals"].items():
            if found["scores"] is not None:
                taken.setdefault(name, []).append(found["seconds"])
    return {name: statistics.median(values) for name, values in taken.items()}


# Code of a stage, what the results of older versions call it, and the scores that are known behind it.
STAGES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("losses", "losses of the model as it stands", ()),
    ("statistics", "statistics of all blocks", ("natural energy", "cross energy", "held-out energy", "energy")),
    ("joint-rounds", "joint rounds", ()),
    ("leave-one-out", "leaving one block out", ("unique",)),
    ("solo-rounds", "refining blocks alone", ("alone",)),
)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return all figures, per model family and group."""
    families = {}
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        healthy = [row for row in own if row["group"] == "healthy"]
        faults = [row for row in own if is_fault(row)]
        families[family] = {
            "cases": len(own),
            "healthy": len(healthy),
            "faults": len(faults),
            "cost_nothing": [row["name"] for row in own if row["block"] is not None and not is_fault(row)],
            "localisation": {
                group: localisation(chosen)
                for group in ("after training", "during training")
                if (chosen := [row for row in faults if row["group"] == group])
            },
            "against_depth": localisation([with_depth(row) for row in faults if row["group"] == "after training"]),
            "against_history": localisation([row for row in with_history(own) if is_fault(row)]),
            "false_flags": false_flags(healthy),
            "verdicts": {
                "healthy, in training": verdicts([row for row in healthy if not is_finished(row, healthy)]),
                "healthy, finished": verdicts([row for row in healthy if is_finished(row, healthy)]),
                "at fault": verdicts(faults),
                "block at fault": verdicts([only_at_fault(row) for row in faults]),
            },
            "seconds": seconds(own),
        }
    return {"families": families}


def _names(cases: Sequence[tuple[Row, dict[str, list[float]]]]) -> list[str]:
    return list(dict.fromkeys(name for _, scores in cases for name in scores))


def _mean(values: Iterable[float | bool]) -> float:
    found = [float(v) for v in values]
    return statistics.fmean(found) if found else float("nan")
