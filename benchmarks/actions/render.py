"""Write what the arms reached into ``benchmarks/results/actions*.json`` and ``docs/actions.md``.

    python benchmarks/actions/render.py [--size small] [--page-only]

Only arms whose every report seed is finished are written. An arm of the result file that has no training in the folder
stays as it was measured, if uniform's losses here are those in the file. The page is written by hand; only what stands
between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` is made here.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from common import RESULTS, environment, rounded  # noqa: E402
from peelwise.evidence.actions import CASES, MEASURED  # noqa: E402
from peelwise.evidence.intervals import Paired, paired  # noqa: E402

PAGE = ROOT / "docs" / "actions.md"
FILE = RESULTS / "actions.json"
FILES = {"small": FILE, "deep": RESULTS / "actions_deep.json"}
UNIFORM = "uniform"
SAME = 1e-3  # nats: as near as uniform's loss must come to the recorded one before an arm on record is kept beside it
# The controls that an arm must beat before its idea, and not only its rate or its sparsity, is what helped.
CONTROLS = {
    "growth by importance": ("growth by shuffled importance", "growth by importance shuffled above the first block"),
    "importance-sampled half of the blocks per step": (
        "random half of the blocks per step",
        "random half of the blocks per step, the first always",
    ),
    "blockwise rates by kind": ("the same rates, kinds shuffled", "twice the rate for the embedding alone"),
}
Row = dict[str, Any]


def recorded(size: str) -> dict[str, Any]:
    """Return the result file of a size, empty if there is none."""
    file = FILES.get(size)
    return json.loads(file.read_text()) if file is not None and file.exists() else {}


def controls_of(arm: str) -> tuple[str, ...]:
    """Return the names of an arm's controls."""
    if arm.startswith("map [1, 5] by ") and not arm.endswith((" at 1", "permutation")):
        mean = f"constant at the mean of the {arm.replace('map [1, 5] by', 'map by')}"
        return mean, "map [1, 5] by permutation"
    return CONTROLS.get(arm, ())


def summary(rows: Sequence[Row], seeds: Sequence[int], before: Sequence[Row] = ()) -> list[dict[str, Any]]:
    """Return what each finished arm reached: those on record first, then others in the order of their trainings.

    Args:
        rows: trainings.
        seeds: of the report.
        before: arms on record.
    """
    by_key = {(r["arm"], r["rate"], r["seed"], r["budget"]): r for r in rows}
    on_record = {each["arm"]: each for each in before}
    tuned = {arm: _tuned(rows, arm, seeds, on_record) for arm in dict.fromkeys(r["arm"] for r in rows)}
    full = {
        arm: [by_key[arm, rate, seed, 1.0] for seed in seeds]
        for arm, (rate, _) in tuned.items()
        if all((arm, rate, seed, 1.0) in by_key for seed in seeds)
    }
    uniform = full[UNIFORM]
    if on_record:
        apart = max(abs(r["held_out"] - u) for r, u in zip(uniform, on_record[UNIFORM]["held_out"], strict=True))
        if apart > SAME:
            raise SystemExit(f"Uniform is {apart:.2g} nats from its record: train all arms again (--again).")
    found = dict(on_record)
    for arm, runs in full.items():
        rate, grid = tuned[arm]
        short = [by_key.get((arm, rate, seed, 0.8)) for seed in seeds]
        found[arm] = {
            "arm": arm,
            "rate": rate,
            "grid": grid,
            "rate_at_end_of_grid": rate in (min(float(r) for r in grid), max(float(r) for r in grid)),
            "steps": [r["steps"] for r in runs],
            "block_steps": [sum(r["block_steps"]) for r in runs],
            "processor_seconds": [r["processor_seconds"] for r in runs],
            "wall_seconds": [r["wall_seconds"] for r in runs],
            "held_out": [r["held_out"] for r in runs],
            "against_uniform": _against(runs, uniform),
            "share_of_budget_to_uniform": [_share_to_reach(r, u) for r, u in zip(runs, uniform, strict=True)],
            "at_0.8_against_uniform": _against([r for r in short if r], uniform)
            if all(short)
            else on_record.get(arm, {}).get("at_0.8_against_uniform"),
            "factors": [r["factors"][-1] for r in runs if r["factors"]],
        }
    return list(found.values())


def against_controls(arms: Sequence[Row]) -> list[dict[str, Any]]:
    """Return held-out loss minus that of each control that is finished too, seed by seed and over seeds."""
    by_name, found = {each["arm"]: each for each in arms}, []
    for each in arms:
        for control in controls_of(each["arm"]):
            if control in by_name:
                pairs = zip(each["held_out"], by_name[control]["held_out"], strict=True)
                found.append({"arm": each["arm"], "control": control} | _over_seeds([a - b for a, b in pairs]))
    return found


def _tuned(rows: Sequence[Row], arm: str, seeds: Sequence[int], on_record: Row) -> tuple[float, dict[str, float]]:
    tried = {r["rate"]: r["held_out"] for r in rows if r["arm"] == arm and r["seed"] not in seeds}
    if not tried:
        return on_record[arm]["rate"], on_record[arm]["grid"]
    best = min(tried, key=tried.__getitem__)
    return best, {f"{rate:g}": tried[rate] for rate in sorted(tried)}


def _against(runs: Sequence[Row], others: Sequence[Row]) -> dict[str, Any]:
    """Return held-out loss minus the other's, per seed (paired over windows) and over seeds; below 0 is better."""
    per_seed = []
    for own, other in zip(runs, others, strict=True):
        differences = [a - b for a, b in zip(own["by_window"], other["by_window"], strict=True)]
        found = paired(differences, [1.0] * len(differences)).interval()
        per_seed.append({"mean": found.mean, "low": found.low, "high": found.high})
    return _over_seeds([each["mean"] for each in per_seed]) | {"per_seed": per_seed}


def _over_seeds(means: Sequence[float]) -> dict[str, Any]:
    one = paired(means, [1.0] * len(means)) if len(means) > 1 else None
    # Of three differences no skewness can be told: Student's t alone.
    over = None if one is None else Paired(one.mean, one.standard_error, one.sequences).interval()
    return {
        "per_seed": list(means),
        "mean": statistics.mean(means),
        "spread": statistics.stdev(means) if len(means) > 1 else None,
        "low": None if over is None else over.low,
        "high": None if over is None else over.high,
    }


def _share_to_reach(run: Row, uniform: Row) -> float | None:
    """Return after which share of the budget a run was first at or below uniform's final loss, as its curve has it.

    Of uniform itself, 1. Rates fall to the end of a run, so that a curve says little of a shorter run.
    """
    goal, last = uniform["held_out"], None
    for point in run["curve"]:
        if point["held_out"] <= goal + 1e-9:
            steps = float(point["step"])
            if last is not None and last["held_out"] > goal:
                part = (last["held_out"] - goal) / (last["held_out"] - point["held_out"])
                steps = last["step"] + part * (point["step"] - last["step"])
            return steps / run["steps"]
        last = point
    return None


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Return what stands between the markers of the page."""
    arms = result["arms"]
    return {
        "arms": _table(
            ("arm", "steps", "block-steps", "seconds", "rate", "held-out loss", "minus uniform", "95 % over seeds",
             "reaches uniform's loss at"),
            (_arm_row(each, arms) for each in arms),
        ),
        "controls": _table(
            ("arm", "its control", "minus its control", "95 % over seeds",
             *(f"seed {seed}" for seed in result["seeds"])),
            (_control_row(each) for each in against_controls(arms)),
        ),
        "seeds": _table(
            ("arm", *(f"seed {seed}" for seed in result["seeds"])),
            ([each["arm"], *(_interval(one) for one in each["against_uniform"]["per_seed"])]
             for each in arms if each["arm"] != UNIFORM),
        ),
        "goal": _goal(result),
        "costs": _table(("what", "full steps"), ([k, f"{v:.2f}"] for k, v in sorted(result["costs"].items()))),
    } | ({} if result["size"] != "small" else {
        "cases": cases(),
        "mended": mended(json.loads((RESULTS / "mended_block.json").read_text())),
    })  # fmt: skip


def _arm_row(each: dict[str, Any], arms: Sequence[dict[str, Any]]) -> list[str]:
    uniform = next(other for other in arms if other["arm"] == UNIFORM)
    relative = statistics.mean(each["block_steps"]) / statistics.mean(uniform["block_steps"])
    seconds = statistics.mean(each["processor_seconds"]) / statistics.mean(uniform["processor_seconds"])
    against = each["against_uniform"]
    return [
        each["arm"],
        f"{statistics.mean(each['steps']):.0f}",
        f"{relative:.2f}",
        f"{seconds:.2f}",
        f"{each['rate']:g}{' *' if each['rate_at_end_of_grid'] else ''}",
        f"{statistics.mean(each['held_out']):.3f}",
        "" if each is uniform else f"{against['mean']:+.3f}",
        "" if each is uniform else f"{against['low']:+.3f} .. {against['high']:+.3f}",
        _reached(each["share_of_budget_to_uniform"]),
    ]


def _control_row(each: dict[str, Any]) -> list[str]:
    over = f"{each['low']:+.3f} .. {each['high']:+.3f}"
    return [each["arm"], each["control"], f"{each['mean']:+.3f}", over, *(f"{one:+.3f}" for one in each["per_seed"])]


def _reached(shares: Sequence[float | None]) -> str:
    """Return the shares of the budget, seed by seed; one word where none is reached."""
    if all(share is None for share in shares):
        return "never"
    return ", ".join("never" if share is None else f"{share:.2f}" for share in shares)


def cases() -> str:
    """Return what was measured to help, case by case: the table that suggestions are made from."""
    rows = []
    for each in MEASURED:
        arms = json.loads((RESULTS / each.result).read_text())["arms"]
        if isinstance(arms, dict):
            found = arms[each.arm]["at_equal_cost"]
            than = f"{each.control}: {arms[each.control]['at_equal_cost']['mean']:+.3f}" if each.control else ""
        else:
            found, than = next(arm for arm in arms if arm["arm"] == each.arm)["against_uniform"], ""
        over = f"{found['low']:+.3f} .. {found['high']:+.3f}"
        link = f"[{each.result}](#{each.section})"
        rows.append(
            [CASES[each.case], each.arm, f"{found['mean']:+.3f}", over, than, "yes" if each.helps else "no", link]
        )
    header = (
        "case",
        "action",
        "minus training on as before",
        "95 % over seeds",
        "a control",
        "suggested",
        "measured in",
    )
    return _table(header, rows)


def mended(result: dict[str, Any]) -> str:
    """Return the table of the block that was damaged."""
    marks = list(result["arms"]["training alone"]["held_out"])
    header = ("arm", *(f"after {mark} steps" for mark in marks), "minus training alone, at equal cost",
              "95 % over seeds", "better on seeds")  # fmt: skip
    rows = []
    for name, arm in result["arms"].items():
        if isinstance(arm, dict):
            equal = arm["at_equal_cost"]
            difference = (
                f"{equal['mean']:+.3f} (after {equal['mark']} steps)",
                f"{equal['low']:+.3f} .. {equal['high']:+.3f}",
            )
            said = ("", "", "") if name == "training alone" else (
                *difference, f"{equal['better_on_seeds']} of {len(equal['per_seed'])}")  # fmt: skip
            rows.append([name, *(f"{arm['held_out'][mark]:.3f}" for mark in marks), *said])
    return _table(header, rows)


def _goal(result: dict[str, Any]) -> str:
    rows = [
        [each["arm"], *(_interval(one) for one in each["at_0.8_against_uniform"]["per_seed"])]
        for each in result["arms"]
        if each["at_0.8_against_uniform"]
    ]
    met = reaching(result["arms"])
    said = f"Reached by: {', '.join(met)}." if met else "None of the finished arms reaches it on all seeds."
    header = ("arm, trained for 0.8 of the budget", *(f"seed {seed}" for seed in result["seeds"]))
    return f"{said}\n\n{_table(header, rows)}"


def reaching(arms: Sequence[dict[str, Any]]) -> list[str]:
    """Return the arms that are at or below uniform's final loss on every seed after 0.8 of its budget."""
    return [
        each["arm"]
        for each in arms
        if each["at_0.8_against_uniform"]
        and all(one["mean"] <= 0 for one in each["at_0.8_against_uniform"]["per_seed"])
    ]


def _interval(one: dict[str, float]) -> str:
    return f"{one['mean']:+.3f} ({one['low']:+.3f} .. {one['high']:+.3f})"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(page: str, result: dict[str, Any]) -> str:
    """Return the page with the tables of a size made anew; of others than the small one, arms and controls."""
    made = tables(result)
    if result["size"] != "small":
        made = {f"{result['size']}-{name}": made[name] for name in ("arms", "controls")}
    for name, text in made.items():
        place = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        page, count = re.subn(place, lambda m, t=text: f"{m[1]}{t}\n{m[2]}", page, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{PAGE} has {count} places for {name}, expected one.")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--page-only", action="store_true", help="only make the page from the result file")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "actions")
    options = parser.parse_args()
    if not options.page_only:
        FILES[options.size].write_text(json.dumps(result_of(options), indent=1) + "\n")
    result = recorded(options.size)
    PAGE.write_text(filled(PAGE.read_text(), result))
    print(f"{result['trainings']} trainings, {len(result['arms'])} arms finished on all seeds")


def result_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what is written into the result file: the trainings in the folder, and arms on record."""
    folder, before = options.out / options.size, recorded(options.size)
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines() if line.endswith("}")]
    file = folder / "costs.json"
    costs = before.get("costs", {}) | (json.loads(file.read_text()) if file.exists() else {})
    arms = summary(rows, options.seeds, before.get("arms", ()))
    earlier = {name for each in before.get("arms", ()) if (name := each["arm"]) not in {r["arm"] for r in rows}}
    command = f"python benchmarks/actions/run.py --size {options.size}"
    result = environment(command) | {
        "size": options.size,
        "seeds": options.seeds,
        "costs": costs,
        "trainings": len(rows),
        "measured_before": sorted(earlier),
        "arms": arms,
    }
    return rounded(result)


if __name__ == "__main__":
    main()
