"""What arXiv:2603.19348 says of the blocks of SmolLM2-135M, beside what an anatomy of it measures, with controls.

    python benchmarks/anatomy_claims.py [--budget 55m] [--studies predictability,ablation,bending]

Resumable: it begins with what the result file holds, measures what is missing within the budget, and keeps every piece
in ``out/anatomy``. The paper evaluates on ten sentences; what draws of ten say is measured by ``anatomy_sentences.py``,
whose result is read here. The packaged model is the instruct one, in four bits; the paper's is not known. Writes the
result file and the tables of ``docs/anatomy.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import peelwise
from common import RESULTS, environment, rounded
from peelwise.evidence.anatomy import rank_correlation
from peelwise.records.anatomy import AnatomyRecord, BlockAnatomy
from peelwise.records.base import Interval
from peelwise.tasks.anatomy.unfinished import FOUND, Unfinished

ROOT = Path(__file__).resolve().parents[1]
OUT, PAGE = ROOT / "out" / "anatomy", ROOT / "docs" / "anatomy.md"
SENTENCES = RESULTS / "anatomy_sentences.json"
SMALL = ROOT / "examples" / "small_gpt" / "checkpoints" / "step-02400"
SENTENCE = 32
HEADER = ["claim", "the paper", "here", "control", "does it agree?"]
CORE, LEFT_OUT = (8, 9, 10, 11), (14, 17)


def anatomy_of(name: str, model: str | Path, options: peelwise.ProbeOptions, settings: peelwise.AnatomySettings) -> Any:
    """Return the record of a model's anatomy: what the result file holds, and more where something is missing."""
    known = AnatomyRecord.model_validate(recorded(name)) if recorded(name) else None
    if known is not None and _has_all(known, settings.wanted):
        return known
    folder = OUT / name
    pieces = Path(f"{folder}.unfinished")
    if known is not None and not (pieces / FOUND).exists():
        begun = Unfinished(pieces, about(known), [_fields(block) for block in known.blocks], [*known.predictability])
        begun.write()
    return peelwise.anatomy(model, options, settings, out=folder, force=folder.exists()).record


def about(known: AnatomyRecord) -> dict[str, Any]:
    """Return what the pieces of a record belong to, as a run of the same model and text says it."""
    chosen = {key: known.settings[key] for key in ("margin", "micro_batch_tokens")}
    return {"model": known.model.fingerprint, "probe": known.probe.fingerprint, "seed": known.seed, **chosen,
            "peelwise": known.versions["peelwise"]}  # fmt: skip


def recorded(name: str) -> dict[str, Any]:
    """Return what the result file holds of a model, empty if there is none."""
    file = RESULTS / "anatomy_claims.json"
    return json.loads(file.read_text())["records"].get(name, {}) if file.exists() else {}


def _has_all(record: AnatomyRecord, studies: Sequence[str]) -> bool:
    fields = {"ablation": "ablation", "bending": "bent", "recovery": "recovery"}
    wanted = [fields[study] for study in studies if study in fields]
    return all(getattr(block, field) for block in record.blocks for field in wanted)


def _fields(block: BlockAnatomy) -> dict[str, Any]:
    """Return what is known of a block: a study that has not come to it has left nothing."""
    found = {name: getattr(block, name) for name in ("ablation", "predicted", "bent", "best_scale", "recovery")}
    return {name: value for name, value in found.items() if value}


def percent(nats: float) -> str:
    """Return a difference of losses as the relative change of perplexity."""
    return f"{100 * math.expm1(nats):+,.1f} %"


def claims(record: AnatomyRecord) -> list[list[str]]:
    """Return a row per claim: the paper's, what was measured, the control, and what follows."""
    rows: list[list[str]] = []
    for way in ("neighbours", "skipped", "predicted"):
        costs = {b.index: cost for b in record.blocks if (cost := _cost(b, way)) is not None}
        if not set(CORE) <= set(costs):
            continue
        order = sorted(costs, key=lambda index: -costs[index].mean)
        most, least = costs[order[0]], costs[order[-1]]
        places = ", ".join(str(order.index(block) + 1) for block in CORE)
        rows += [
            [f"range of importance ({way})", "+63,419 % (block 11) to -0.6 % (14, 17)",
             f"{percent(most.mean)} (block {order[0]}) to {percent(least.mean)} (block {order[-1]})",
             f"{len(costs)} of {len(record.blocks)} blocks measured",
             ("wide too" if most.mean > math.log(2) else "narrower") + "; the least is "
             + ("above 0" if least.low > 0 else "below 0" if least.high < 0 else "not told from 0")],
            [f"core in blocks 8 to 11 ({way})", "the critical ones", f"places {places} of {len(costs)}",
             f"at random: {(len(costs) + 1) / 2:g} on average",
             "cannot be told: the last blocks are missing" if len(costs) < len(record.blocks) else
             "agrees" if sum(order.index(b) < len(CORE) + 2 for b in CORE) >= 3 else
             "in part" if any(order.index(b) < len(CORE) for b in CORE) else "does not"],
        ]  # fmt: skip
        better = {(each.block, each.ablation) for each in record.better_without}
        for block in sorted(set(LEFT_OUT) & set(costs)):
            cost = costs[block]
            rows.append(
                [f"better without block {block} ({way})", "-0.6 %",
                 f"{cost.mean:+.3f} nats ({cost.low:+.3f} .. {cost.high:+.3f})",
                 f"better without, of all blocks and ways, after Holm: {len(better)}",
                 "does not" if cost.low > 0 else "agrees" if cost.high < 0 else "cannot be told"]
            )  # fmt: skip
    for each in record.predictability:
        if "gate" in each.part:
            rows.append(
                ["gate predicted from other blocks", "R2 0.91", f"R2 {each.explained.ridge:.3f}",
                 f"independent matrices: {each.independent.ridge:.3f}; the others' mean: {each.explained.mean:.3f}",
                 "does not" if each.explained.ridge < 0.5 else "agrees"]
            )  # fmt: skip
    if record.predictability:
        values = [each.deltas for each in record.predictability]
        lows, highs = ([each.deltas_shuffled[end] for each in record.predictability] for end in (1, 2))
        inside = sum(low <= v <= high for v, low, high in zip(values, lows, highs, strict=True))
        rows.append(
            ["correlation of successive differences", "-0.50", f"{min(values):.3f} to {max(values):.3f}, by matrix",
             f"random order: {min(lows):.3f} .. {max(highs):.3f}; {inside} of {len(values)} kinds within their own",
             "differs" if max(abs(value + 0.5) for value in values) > 0.1 else
             "agrees, and is not told from chance" if inside == len(values) else "agrees in size"]
        )  # fmt: skip
    return rows


def _cost(block: BlockAnatomy, way: str) -> Interval | None:
    return block.predicted if way == "predicted" else dict(block.ablation).get(way)  # type: ignore[call-overload]


def blocks_table(record: AnatomyRecord) -> str:
    """Return ablation of every block as a table of the page."""
    ways = [w for w in ("skipped", "attention", "mlp", "mean", "neighbours") if w in record.blocks[0].ablation]
    header = ["block", *ways, "predicted"]
    lines = [header, ["---"] * len(header)]
    for b in record.blocks:
        cells = [_cell(b.ablation.get(way)) for way in ways]  # type: ignore[call-overload]
        lines.append([str(b.index), *cells, _cell(b.predicted)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def weights_table(record: AnatomyRecord) -> str:
    """Return predictability with its controls as a table of the page."""
    header = ["matrix", "ridge R2", "independent", "mean R2", "independent", "differences", "shuffled, 95 %"]
    lines = [header, ["---"] * len(header)]
    for p in record.predictability:
        _, low, high = p.deltas_shuffled
        lines.append(
            [p.part, f"{p.explained.ridge:.3f}", f"{p.independent.ridge:.3f}", f"{p.explained.mean:.3f}",
             f"{p.independent.mean:.3f}", f"{p.deltas:.3f}", f"{low:.3f} .. {high:.3f}"]
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bends_table(record: AnatomyRecord) -> str:
    """Return what the blocks tolerate, and what a damage leaves, as a table of the page."""
    measured = [b for b in record.blocks if b.bent]
    kinds = [bent.kind for bent in measured[0].bent]
    header = ["block", *kinds, "best factor", "its gain", "recovered", "retrained"]
    lines = [header, ["---"] * len(header)]
    for b in measured:
        best, share = b.best_scale, b.recovery.share if b.recovery else None
        lines.append(
            [str(b.index), *("none" if bent.tolerated is None else f"{bent.tolerated:g}" for bent in b.bent),
             "" if best is None else f"{best.factor:.3g}", "" if best is None else _cell(best.gain),
             "" if share is None else f"{100 * share:.0f} %", _retrained(b)]
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _retrained(block: BlockAnatomy) -> str:
    done = block.recovery.retrained if block.recovery else None
    return "" if done is None else f"{100 * done.share:.0f} % in {done.best_step} steps"


def _cell(cost: Interval | None) -> str:
    return "" if cost is None else f"{cost.mean:+.3f} ({cost.low:+.3f} .. {cost.high:+.3f})"


def sentences_rows(found: dict[str, Any]) -> list[list[str]]:
    """Return what many tokens and draws of ten sentences say of importance, with the neighbours' weights."""
    blocks, tokens = found["blocks"], found["tokens_in_all"]
    order = sorted(blocks, key=lambda each: -each["mean"])
    most, least, of = order[0], order[-1], {each["block"]: each for each in blocks}
    places = [1 + order.index(of[block]) for block in CORE]
    inner = [each["block"] for each in order if 2 <= each["block"] < len(blocks) - 2]
    led = sum(block in inner[: len(CORE)] for block in CORE)
    what = f"neighbours, {tokens:,} tokens"
    rows = [
        [f"range of importance ({what})", "+63,419 % (block 11) to -0.6 % (14, 17)",
         f"{percent(most['mean'])} (block {most['block']}) to {percent(least['mean'])} (block {least['block']})",
         f"block 11: {percent(of[11]['mean'])}, ten sentences: {percent(of[11]['ten_low'])} to "
         f"{percent(of[11]['ten_high'])}; first of all in {100 * of[11]['ten_most_important']:.0f} % of draws",
         "wide too; the least is " + ("above 0" if least["low"] > 0 else "below 0" if least["high"] < 0 else
                                      "not told from 0")],
        [f"core in blocks 8 to 11 ({what})", "the critical ones",
         f"places {', '.join(map(str, places))} of {len(blocks)}",
         f"of the four costliest without the two at each end, {led} are of the core; at random "
         f"{len(CORE) ** 2 / len(inner):.1f}; of ten sentences {found['core_among_inner_four']:.1f}",
         "agrees" if led == len(CORE) else "in part" if led else "does not"],
    ]  # fmt: skip
    for block in LEFT_OUT:
        each = of[block]
        rows.append(
            [f"better without block {block} ({what})", "-0.6 %",
             f"{each['mean']:+.3f} nats ({each['low']:+.3f} .. {each['high']:+.3f})",
             f"ten sentences: {each['ten_low']:+.3f} .. {each['ten_high']:+.3f}, below 0 in "
             f"{100 * each['ten_better_without']:.1f} % of draws",
             "does not" if each["low"] > 0 else "agrees" if each["high"] < 0 else "cannot be told"]
        )  # fmt: skip
    by_chance = found["any_better_without"]
    rows.append(
        ["ten sentences find a block that is better left out", "two", f"in {100 * by_chance:.0f} % of draws",
         f"both 14 and 17: in {100 * found['both_better_without']:.1f} %",
         "too few to tell" if by_chance > 0.05 else "seldom by chance"]
    )  # fmt: skip
    return rows


def recovery_row(record: AnatomyRecord) -> list[str]:
    """Return the claim that recovery follows importance, on the small GPT."""
    known = [(b.ablation["skipped"].mean, b.recovery.share) for b in record.blocks if b.recovery and b.recovery.share]
    found = rank_correlation(*zip(*known, strict=True)) if len(known) == len(record.blocks) else None
    said = "not measured" if found is None else f"rank correlation {found[0]:+.2f} (p = {found[1]:.2f})"
    return ["recovery follows importance (small GPT, one closed-form round)", "yes", said,
            f"{len(known)} blocks", "cannot be told" if found is None or found[1] > 0.05 else "agrees"]  # fmt: skip


def scaling_row(record: AnatomyRecord, name: str) -> list[str]:
    """Return the claim that scaling by 0.9 alone is survived: against the mildest of the others."""
    measured = [b for b in record.blocks if b.bent]
    mildest = {bent.kind: [] for b in measured for bent in b.bent}  # type: dict[str, list[float]]
    for bent in (bent for b in measured for bent in b.bent):
        mildest[bent.kind].append(bent.costs[0].mean)
    scaled = mildest.pop("scale-down")
    milder = [kind for kind, costs in mildest.items() if sum(costs) < sum(scaled)]
    first = {bent.kind: bent.strengths[0] for bent in measured[0].bent}
    named = ", ".join(f"{kind} {first[kind]:g}" for kind in milder) or "none"
    what = f"only scaling by 0.9 survives ({name}, {len(measured)} of {len(record.blocks)} blocks)"
    return [what, "+19 %", f"{percent(min(scaled))} to {percent(max(scaled))}", f"cost less on average: {named}",
            "does not: it is not alone" if milder else "agrees"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="55m", help="of SmolLM2's anatomy; 0 to measure nothing")
    parser.add_argument("--studies", default="predictability,ablation,bending", help="of SmolLM2's anatomy")
    parser.add_argument("--tokens", type=int, default=3_000, help="of SmolLM2's anatomy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    small = anatomy_of(
        "small_gpt", SMALL, peelwise.ProbeOptions(tokens=20_000, sequence_length=128), peelwise.AnatomySettings("20m")
    )
    probe = peelwise.ProbeOptions(tokens=options.tokens, sequence_length=SENTENCE)
    if options.budget == "0":
        smollm2 = AnatomyRecord.model_validate(recorded("smollm2"))
    else:
        settings = peelwise.AnatomySettings(options.budget, tuple(options.studies.split(",")))
        smollm2 = anatomy_of("smollm2", "smollm2", probe, settings)
    PAGE.write_text(filled(PAGE.read_text(), smollm2, small))
    plain = {name: _plain(record) for name, record in (("smollm2", smollm2), ("small_gpt", small))}
    rows = [dict(zip(HEADER, row, strict=True)) for row in claims_rows(smollm2, small)]
    result = environment() | {"claims": rows, "records": plain}
    (RESULTS / "anatomy_claims.json").write_text(json.dumps(result, indent=1) + "\n")


def claims_rows(smollm2: AnatomyRecord, small: AnatomyRecord) -> list[list[str]]:
    """Return all rows of the table of claims."""
    rows = claims(smollm2)
    if SENTENCES.exists():
        rows += sentences_rows(json.loads(SENTENCES.read_text()))
    named = ((smollm2, "SmolLM2"), (small, "small GPT"))
    rows += [scaling_row(record, name) for record, name in named if any(block.bent for block in record.blocks)]
    return [*rows, recovery_row(small)]


def filled(page: str, smollm2: AnatomyRecord, small: AnatomyRecord) -> str:
    """Return the page with its tables made anew."""
    lines = [HEADER, ["---"] * len(HEADER), *claims_rows(smollm2, small)]
    made = {
        "claims": "\n".join(f"| {' | '.join(line)} |" for line in lines),
        "smollm2": blocks_table(smollm2),
        "weights": weights_table(smollm2),
        "small": blocks_table(small),
        "bends": bends_table(small),
    }
    if any(block.bent for block in smollm2.blocks):
        made["smollm2-bends"] = bends_table(smollm2)
    for name, text in made.items():
        place = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        page, count = re.subn(place, lambda m, t=text: f"{m[1]}{t}\n{m[2]}", page, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{PAGE} has {count} places for {name}, expected one.")
    return page


def _plain(record: AnatomyRecord) -> dict[str, Any]:
    """Return a record without the signals of its blocks, which are the longest part of it, rounded."""
    found = record.model_dump(mode="json", by_alias=True)
    for block in found["blocks"]:
        block.pop("signals")
    return rounded(found)


if __name__ == "__main__":
    main()
