"""Write the measured cases and their figures into ``benchmarks/results/truth`` and into ``docs/truth.md``.

The page is written by hand; only what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` is made here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

from common import rounded
from figures import Row, errors_of, is_fault, is_tied, scores_of
from rivals import RIVALS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "peelwise"  # the same file at every run

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "truth"
PAGE = ROOT / "docs" / "truth.md"
FIGURE = ROOT / "docs" / "figures" / "truth-localisation.svg"
OURS, RIVAL = "#2f6db5", "#a9a9a9"
SHOWN_AS = {  # names on the page of the keys in cases.json, which stay
    "peelwise: alone": "peelwise: solo gain",
    "peelwise: unique": "peelwise: marginal gain",
    "peelwise: natural energy": "peelwise: natural-gradient score",
    "peelwise: energy": "peelwise: input-whitened score",
    "peelwise: held-out energy": "peelwise: held-out input-whitened score",
    "peelwise: cross energy": "peelwise: cross input-whitened score",
    "removal": "ablation",
}
NEEDS = {rival.name: rival.needs for rival in RIVALS}  # ours need data, all of them


def write(summary: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write both result files, the page's tables and the figure."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "figures.json").write_text(json.dumps(rounded(summary), indent=1) + "\n")
    lines = ",\n".join(json.dumps(rounded(row)) for row in rows)
    (RESULTS / "cases.json").write_text(f"[\n{lines}\n]\n")  # one case a line
    draw(summary)
    if PAGE.exists():
        PAGE.write_text(filled(PAGE.read_text(), summary, rows))


def filled(page: str, summary: dict[str, Any], rows: Sequence[Row]) -> str:
    """Return the page with every marked part made again."""

    def part(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- begin {name} -->\n{PARTS[name](summary, rows)}\n<!-- end {name} -->"

    return re.sub(r"<!-- begin ([a-z0-9 ]+) -->.*?<!-- end \1 -->", part, page, flags=re.DOTALL)


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def shown(name: str) -> str:
    """Return a statistic's name on the page, ours in bold."""
    label = SHOWN_AS.get(name, name)
    return f"**{label}**" if name.startswith("peelwise") else label


def variant_table(family: str, variant: str) -> Callable[[dict[str, Any], Sequence[Row]], str]:
    """Return what makes the table of statistics seen against depth or history, the best first."""

    def make(summary: dict[str, Any], rows: Sequence[Row]) -> str:
        chosen = summary["families"].get(family, {}).get(variant)
        if not chosen:
            return "Not measured."
        order = sorted(chosen, key=lambda name: -chosen[name]["area_under_curve"])
        lines = [
            [
                shown(name),
                *(percent(chosen[name][key]) for key in ("first", "within_one")),
                f"{chosen[name]['area_under_curve']:.2f}",
                str(chosen[name]["cases"]),
            ]
            for name in order
        ]
        return table(["statistic", "first", "within one block", "area", "cases"], lines)

    return make


def localisation_table(family: str, group: str) -> Callable[[dict[str, Any], Sequence[Row]], str]:
    """Return what makes the table of one family and group, the best statistic first."""

    def make(summary: dict[str, Any], rows: Sequence[Row]) -> str:
        found = summary["families"].get(family, {})
        chosen = found.get("localisation", {}).get(group)
        if not chosen:
            return "Not measured yet."
        order = sorted(chosen, key=lambda name: -chosen[name]["area_under_curve"])
        lines = [
            [
                shown(name),
                *(percent(chosen[name][key]) for key in ("first", "first_or_tied", "within_one")),
                f"{chosen[name]['area_under_curve']:.2f}",
                percent(chosen[name]["flagged"]),
                percent(found["false_flags"].get(name, float("nan"))),
                f"{found['seconds'].get(name, float('nan')):.1f}",
                NEEDS.get(name, "data"),
                str(chosen[name]["cases"]),
            ]
            for name in order
        ]
        header = [
            "statistic",
            "first",
            "first or tied",
            "within one block",
            "area",
            "stands out",
            "healthy blocks that do",
        ]
        return table([*header, "seconds", "needs", "cases"], lines)

    return make


def kinds_table(family: str) -> Callable[[dict[str, Any], Sequence[Row]], str]:
    """Return what makes the table of kinds of fault: cost, and in how many cases each of some statistics is right."""

    def make(summary: dict[str, Any], rows: Sequence[Row]) -> str:
        own = [row for row in rows if row["family"] == family and row["block"] is not None]
        names = [n for n in SHOWN if any(n in scores_of(row) for row in own)]
        lines = []
        for kind in dict.fromkeys(row["kind"] for row in own):
            cases = [row for row in own if row["kind"] == kind]
            faults = [row for row in cases if is_fault(row)]
            costs = sorted(row["cost_of_fault"]["mean"] for row in cases)
            cells = []
            for name in names:
                told = [row for row in faults if name in scores_of(row)]
                right = sum(is_tied(scores_of(row)[name], errors_of(row, name), row["block"]) for row in told)
                cells.append(f"{right}/{len(told)}" if told else "-")
            lines.append([kind, f"{costs[0]:.3f} to {costs[-1]:.3f}", f"{len(faults)}/{len(cases)}", *cells])
        return table(["fault", "costs, nats", "real faults", *(SHOWN_AS.get(name, name) for name in names)], lines)

    return make


SHOWN = (
    "peelwise: natural energy",
    "peelwise: unique",
    "peelwise: alone",
    "gradient norm",
    "weightwatcher",
    "removal",
)


def alarms(summary: dict[str, Any], rows: Sequence[Row]) -> str:
    """Make the table of verdicts."""
    lines = []
    for family, found in summary["families"].items():
        for what, told in found["verdicts"].items():
            colours = told["colours"]
            cells = [str(colours.get(c, 0)) for c in ("red", "yellow", "green", "grey")]
            checked = f"{told['red']['wrong']} of {told['red']['checked']}"
            lines.append([family, what, *cells, checked])
    return table(["model", "cases", "red", "yellow", "green", "grey", "red not confirmed on fresh text"], lines)


def coverage(summary: dict[str, Any], rows: Sequence[Row]) -> str:
    """Make the table of coverage, from its own result file."""
    return table(
        ["witness", "intervals", "agree with fresh text", "lower end holds", "fresh gain below the middle"],
        [
            [
                {"alone": "solo"}.get(what, what),
                str(f["intervals"]),
                *(percent(f[key]) for key in ("covered", "low_end_holds", "fresh_below")),
            ]
            for what, f in _result("coverage")["coverage"].items()
        ],
    )


def oracle(summary: dict[str, Any], rows: Sequence[Row]) -> str:
    """Make the table of tightness and cost, from its own result file."""
    lines = []
    for each in _result("oracle")["cases"]:
        truth = each["oracle"]
        for found in each["references"]:
            lines.append(
                [
                    f"{truth['case']} ({sum(truth['gains']) / len(truth['gains']):.4f})",
                    f"{found['fit_tokens']:,} of {found['tokens']:,}, {found['rounds']}",
                    "nothing to gain" if found["share_of_gain"] is None else percent(found["share_of_gain"]),
                    f"{100 * found['share_of_cost']:.1f} %",
                    "-" if found["rank_correlation"] is None else f"{found['rank_correlation']:.2f}",
                ]
            )
    return table(
        ["model (oracle's mean gain)", "fit of all tokens, rounds", "share of the gain", "share of the cost", "ranks"],
        lines,
    )


def certificates(summary: dict[str, Any], rows: Sequence[Row]) -> str:
    """Make the table of certificates under other settings, from its own result file."""
    found = _result("certificates")["rows"]
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in found):
        own = [row for row in found if row["setting"] == setting]
        held = sum(row["status"] == "holds" for row in own)
        farthest = max(row["farthest"] for row in own)
        lines.append([setting, f"{held} of {len(own)}", f"{farthest:.1e}"])
    return table(["verified under", "holds", "farthest number, nats"], lines)


def _result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def goals(summary: dict[str, Any], rows: Sequence[Row]) -> str:
    """Make the table of goals and what was reached, with the solo gain on the small GPT damaged after training."""
    small = summary["families"]["small GPT"]
    best = small["localisation"]["after training"]["peelwise: alone"]
    red = small["verdicts"]["healthy, finished"]["colours"]
    blocks = sum(red.values())
    every = [found for case in _result("oracle")["cases"] for found in case["references"]]
    cheap = [f for f in every if f["share_of_cost"] <= 0.05 and f["share_of_gain"] is not None]
    by_case = [[f for f in case["references"] if f in cheap] for case in _result("oracle")["cases"]]
    tight = [max((f["share_of_gain"] for f in found), default=0.0) for found in by_case]
    processes = _result("oracle")["rank_correlation_of_all_blocks"]
    fits = [found["fit_tokens"] for found in _result("oracle")["cases"][0]["references"]]
    held = _result("certificates")["rows"]
    lines = [
        ["block at fault first or tied (solo gain)", "90 %", counted(best, "first_or_tied")],
        ["first within one block (solo gain)", "98 %", counted(best, "within_one")],
        ["red blocks in finished healthy models", "at most 2 %", f"{red.get('red', 0)} of {blocks}"],
        [
            "share of the oracle's gain at 5 % of its cost or less, per model",
            "75 %",
            ", ".join(percent(share) for share in tight),
        ],
        [
            "rank correlation with the oracle, blocks of all these models, by fit tokens (rounds differ)",
            "0.85",
            ", ".join(f"{rank:.2f} ({tokens:,})" for rank, tokens in zip(processes, fits, strict=True)),
        ],
        [
            "certificates that hold under other settings",
            "all",
            f"{sum(row['status'] == 'holds' for row in held)} of {len(held)}",
        ],
    ]
    return table(["small GPT", "goal", "measured"], lines)


def not_faults(summary: dict[str, Any], rows: Sequence[Row]) -> str:
    """Make the list of what cost nothing."""
    names = [name for found in summary["families"].values() for name in found["cost_nothing"]]
    return ", ".join(f"`{name}`" for name in names) or "None."


PARTS: dict[str, Callable[[dict[str, Any], Sequence[Row]], str]] = {
    "goals": goals,
    "small after": localisation_table("small GPT", "after training"),
    "small during": localisation_table("small GPT", "during training"),
    "large after": localisation_table("SmolLM2-135M", "after training"),
    "small kinds": kinds_table("small GPT"),
    "large kinds": kinds_table("SmolLM2-135M"),
    "alarms": alarms,
    "coverage": coverage,
    "oracle": oracle,
    "certificates": certificates,
    "small depth": variant_table("small GPT", "against_depth"),
    "small history": variant_table("small GPT", "against_history"),
    "large depth": variant_table("SmolLM2-135M", "against_depth"),
    "large history": variant_table("SmolLM2-135M", "against_history"),
    "cost nothing": not_faults,
}


def counted(found: dict[str, float], key: str) -> str:
    """Return a share with the cases behind it, and one more digit where rounding would hide a miss."""
    share, cases = found[key], int(found["cases"])
    return f"{100 * share:.1f} % ({round(share * cases)} of {cases})"


def percent(share: float) -> str:
    """Return a share as a whole percentage; a dash where nothing was measured."""
    return "-" if share != share else f"{100 * share:.0f} %"


def draw(summary: dict[str, Any]) -> None:
    """Draw how often each statistic names the right block, first (solid) or tied (pale), a panel per group of cases.

    A statistic that was asked in fewer cases than the others says in how many.
    """
    panels = [
        (f"{family}, {group}", chosen)
        for family, found in summary["families"].items()
        for group, chosen in found["localisation"].items()
    ]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 4.6), squeeze=False)
    for axis, (title, chosen) in zip(axes[0], panels, strict=True):
        most = max(int(each["cases"]) for each in chosen.values())
        order = sorted(chosen, key=lambda name: [chosen[name][key] for key in ("first_or_tied", "first", "cases")])
        colours = [OURS if name.startswith("peelwise") else RIVAL for name in order]
        tied = axis.barh(range(len(order)), [100 * chosen[n]["first_or_tied"] for n in order], color=colours, alpha=0.4)
        axis.barh(range(len(order)), [100 * chosen[name]["first"] for name in order], color=colours)
        axis.bar_label(tied, fmt="%.0f", padding=3, fontsize=8)
        labels = [SHOWN_AS.get(name, name).removeprefix("peelwise: ") for name in order]
        asked = [int(chosen[name]["cases"]) for name in order]
        axis.set_yticks(
            range(len(order)),
            [label if n == most else f"{label} ({n} only)" for label, n in zip(labels, asked, strict=True)],
            fontsize=8,
        )
        axis.set_xlim(0, 110)
        axis.set_title(f"{title} ({most} faults)", fontsize=10)
        axis.set_xlabel("faults whose block is first (pale: or tied), %", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(FIGURE, metadata={"Date": None})
    plt.close(figure)
