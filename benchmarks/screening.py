"""Is a block ever screened green that gains more than the margin? Counted over damaged and healthy small GPTs.

    python benchmarks/screening.py

Every model: each of its blocks is refined by itself (four rounds), which is the truth, and each in turn gives the step
by which the five others are screened. `wrong` counts blocks that were screened green though their measured gain is
significantly above the margin, `open` those that the slope leaves open, `needless` those of them whose measured gain is
significantly below it.
"""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import RESULTS, environment
from peelwise.engine.opening import open_session
from peelwise.engine.proposals import BlockProposals, Direction
from peelwise.engine.refine import Refined
from peelwise.engine.session import Session
from peelwise.engine.sweep import sweep
from peelwise.evidence.verdict import Evidence, default_margin, judge
from peelwise.model.architectures import find_blocks
from peelwise.model.guard import untouched
from peelwise.tasks.audit.findings import Findings
from peelwise.tasks.audit.screening import screen, steps_of
from small_faults import alone, opened, probe

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]
import damage  # noqa: E402

LEVEL = 0.025
STAGES = {"early": "step 100", "middle": "step 600", "final": "finished"}


def models() -> Iterator[tuple[str, nn.Module]]:
    """Yield the healthy stages, and every kind of damage in the first and an inner block of the finished model."""
    for stage, name in STAGES.items():
        yield name, opened(stage)
    for kind, make in damage.STANDARD.items():
        for block in (3, 0):
            yield f"{kind} in block {block}", make(opened("final"), block, opened("middle"))


def refined(session: Session, proposals: dict[int, BlockProposals]) -> dict[int, Refined]:
    """Return every block refined by itself, but for those that no step helped."""
    output_changes = dict[Direction, float]()
    order = sorted(proposals, key=lambda i: -proposals[i].ranking)
    found = {index: alone(session, proposals, index, output_changes) for index in order}
    return {index: each for index, each in found.items() if each.report_losses is not None}


def row(name: str, model: nn.Module) -> dict[str, Any]:
    """Return what screening says of one model, by every step that there is to go by."""
    counted: Counter[str] = Counter()
    missed: list[dict[str, float]] = []
    with untouched(model), torch.no_grad():
        options: Any = {"budget_seconds": 1e9, "micro_batch_tokens": 2_048, "watcher": None}
        session = open_session(model, find_blocks(model), probe(in_distribution=True), name=name, **options)
        margin = default_margin(session.report.mean)
        proposals = sweep(session.runner, session.fit, session.select)[0]
        truth = refined(session, proposals)
        gains = {i: session.gain(session.report.losses, each.report_losses) for i, each in truth.items()}
        for reference, each in truth.items():
            findings = Findings(proposals=proposals, alone={reference: each})
            if not screen(session, findings, steps_of([each])):
                continue
            bounds = {i: session.gain(gained, torch.zeros_like(gained)) for i, gained in findings.first_order.items()}
            verdicts = judge(
                [Evidence(bound=bounds.get(i)) for i in range(len(proposals))], margin, in_distribution=True
            )
            for index in bounds:
                green, gain = verdicts[index].reason == "screened", gains.get(index)
                above = gain is not None and gain.p_at_most(margin) <= LEVEL
                below = gain is None or gain.p_at_least(margin) <= LEVEL
                counted["green" if green else "open"] += 1
                counted["needless"] += below and not green
                if green and above:
                    counted["wrong"] += 1
                    missed.append({"reference": reference, "block": index, "gain": round(gain.mean, 5)})
    return {"model": name, "margin": round(margin, 5), **counted, "missed": missed}


def main() -> None:
    """Count over all models, print each, and write the JSON after each; models that are in it are not done again."""
    path = RESULTS / "screening.json"
    rows = json.loads(path.read_text())["models"] if path.exists() else []
    for name, model in models():
        if name in [each["model"] for each in rows]:
            continue
        rows.append(row(name, copy.deepcopy(model)))
        print(rows[-1], flush=True)
        total = {key: sum(each.get(key, 0) for each in rows) for key in ("green", "open", "needless", "wrong")}
        path.write_text(json.dumps(environment() | {"total": total, "models": rows}, indent=1))


if __name__ == "__main__":
    main()
