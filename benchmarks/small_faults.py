"""Two questions about faults in the small GPT, on 9,600 tokens of its training text.

    python benchmarks/small_faults.py

*Own gains*: the same text, not declared as training text, so that marginal gains decide. Is the healthy model green,
and the damaged block red and first?

*Slopes*: does step x slope on report bound what a block gains by itself, and is the step the same for all blocks of a
model? The slope is the derivative of the loss along the direction of the first sweep, by one pass back over report. It
is what `benchmarks/screening.py` counts on.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import peelwise
from common import RESULTS, environment
from peelwise.engine.opening import open_session
from peelwise.engine.proposals import DIRECTIONS, BlockProposals, Direction
from peelwise.engine.refine import Refined, unrefined
from peelwise.engine.rounds import next_round
from peelwise.engine.session import Session
from peelwise.engine.slopes import first_order_gains
from peelwise.engine.sweep import sweep
from peelwise.evidence.verdict import default_margin
from peelwise.model.architectures import find_blocks
from peelwise.model.guard import untouched
from peelwise.model.trace import Trace

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("examples", "tests")]
import damage  # noqa: E402
from small_gpt.text import training_documents  # noqa: E402
from stages import stage_folder  # noqa: E402

TOKENS, ROUNDS = 9_600, 4
Fault = Callable[[Any], Any]
FAULTS: dict[str, tuple[Fault, int | None]] = {
    "healthy": (lambda model: model, None),
    "sign of block 3": (lambda model: damage.sign_flip(model, 3), 3),
    "noise in block 4": (lambda model: damage.noise(model, 4, 1.0), 4),
    "block 2 times 0.7": (lambda model: damage.scale(model, 2, 0.7), 2),
    "block 3 re-drawn": (lambda model: damage.reset(model, 3), 3),
}
MODELS: dict[str, tuple[str, Fault]] = {
    "step 100": ("early", lambda model: model),
    "step 600": ("middle", lambda model: model),
    "finished": ("final", lambda model: model),
    "sign of block 3": ("final", lambda model: damage.sign_flip(model, 3)),
    "noise in block 4": ("final", lambda model: damage.noise(model, 4, 1.0)),
    "noise of 0.3 in block 2": ("final", lambda model: damage.noise(model, 2, 0.3)),
}


def opened(stage: str) -> Any:
    """Return a stage of the small GPT."""
    return AutoModelForCausalLM.from_pretrained(stage_folder(stage), dtype=torch.float32).eval()


def probe(*, in_distribution: bool) -> peelwise.Probe:
    """Return the training text, as whoever measures may declare it."""
    documents = [document[:1_500] for document in training_documents()[::12]]
    tokenizer = AutoTokenizer.from_pretrained(stage_folder("final"))
    return peelwise.Probe.from_text(documents, tokenizer, tokens=TOKENS, in_distribution=in_distribution)


def own_gains() -> list[dict[str, Any]]:
    """Return the verdicts of every fault on text that is not declared as training text."""
    text, whole = probe(in_distribution=False), opened("final")
    settings = peelwise.AuditSettings(budget=600.0, joint_rounds=2, solo_rounds=1, controls=False)
    rows = []
    for name, (fault, block) in FAULTS.items():
        record = peelwise.audit(fault(copy.deepcopy(whole)), text, settings).record
        gains = [b.unique_nats.mean for b in record.blocks if b.unique_nats]
        rows.append(
            {
                "fault": name,
                "block": block,
                "loss": round(record.loss.current, 4),
                "verdicts": [b.verdict for b in record.blocks],
                "marginal_gains": [round(gain, 4) for gain in gains],
                "first": max(range(len(gains)), key=gains.__getitem__) if gains else None,
            }
        )
        print(rows[-1], flush=True)
    return rows


def slopes(session: Session, trace: Trace, proposals: dict[int, BlockProposals]) -> dict[tuple[int, Direction], Tensor]:
    """Return ``-sum_t <g_t, D x_t>`` per sequence ``[sequences]``, nats per unit of step, by block and direction."""
    found: dict[tuple[int, Direction], Tensor] = {}
    for direction in DIRECTIONS:
        changes = {i: {m: p.change.float() for m, p in of.changes[direction].items()} for i, of in proposals.items()}
        found |= {(i, direction): gained for i, gained in first_order_gains(session, trace, changes).items()}
    return found


def bounds() -> list[dict[str, Any]]:
    """Return for every block of every model what it gains by itself, beside step x slope."""
    text, rows = probe(in_distribution=True), []
    for name, (stage, fault) in MODELS.items():
        model = fault(opened(stage))
        blocks = find_blocks(model)
        with untouched(model), torch.no_grad():
            options = {"budget_seconds": 1e9, "micro_batch_tokens": 2_048, "watcher": None}
            session = open_session(model, blocks, text, name=name, **options)
            proposals = sweep(session.runner, session.fit, session.select)[0]
            along = slopes(session, session.report, proposals)
            output_changes: dict[Direction, float] = {}
            for block in blocks:
                rows.append({"model": name} | bound(session, proposals, along, block.index, output_changes))
                print(rows[-1], flush=True)
    return rows


def alone(
    session: Session,
    proposals: dict[int, BlockProposals],
    index: int,
    output_changes: dict[Direction, float],
) -> Refined:
    """Return a block refined by itself, `ROUNDS` times or until nothing helps."""
    now = unrefined(session.select, index)
    for _ in range(ROUNDS):
        own = None if now.rounds else {index: proposals[index]}
        better = next_round(session, now, own, output_changes=output_changes, evaluations=6, block=index)
        if better is None:
            break
        now = better
    return now


def bound(
    session: Session,
    proposals: dict[int, BlockProposals],
    along: dict[tuple[int, Direction], Tensor],
    index: int,
    output_changes: dict[Direction, float],
) -> dict[str, Any]:
    """Return what one block gains by itself, and what its slope says at the step of its first round."""
    now = alone(session, proposals, index, output_changes)
    if not now.rounds or now.report_losses is None:
        return {"block": index, "gain": None}
    first = now.rounds[0]
    gained = session.gain(session.report.losses, now.report_losses)
    slope = along[index, first.direction]  # type: ignore[index]
    line = session.gain(first.step * slope, torch.zeros_like(slope))
    return {
        "block": index,
        "direction": first.direction,
        "step": round(first.step, 4),
        "gain": round(gained.mean, 5),
        "step_x_slope": round(line.mean, 5),
        "significant": line.interval().low > 0,
        "margin": round(default_margin(session.report.mean), 5),
    }


def main() -> None:
    """Measure both and write the table."""
    warnings.simplefilter("ignore")
    result = environment() | {"own gains": own_gains(), "slopes": bounds()}
    known = [row for row in result["slopes"] if row.get("significant")]
    result["largest ratio of gain to step x slope, where that is significant"] = round(
        max(row["gain"] / row["step_x_slope"] for row in known), 3
    )
    result["blocks with a significant slope"] = len(known)
    (RESULTS / "small_faults.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
