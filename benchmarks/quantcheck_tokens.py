"""How much of the damage of rounding quantcheck finds left on the table, by tokens and by the damping of its sums.

The small GPT rounded to nearest, against itself, on openings of its training documents: with undamped sums of inputs,
and with the damping that select chooses per layer. Gains are on the same report text in every row.

Example: python benchmarks/quantcheck_tokens.py --formats int3 int2
"""

import argparse
import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from common import write
from peelwise.model.checkpoints import open_model
from peelwise.nn import quantize_
from peelwise.probe.probe import Probe
from peelwise.probe.rows import Split
from peelwise.tasks.quantcheck.layers import Candidate
from peelwise.tasks.quantcheck.run import run_quantcheck
from peelwise.tasks.quantcheck.settings import QuantcheckSettings

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from small_gpt.text import training_documents  # noqa: E402

CHECKPOINTS = EXAMPLES / "small_gpt" / "checkpoints"
SIZES = ((4, 2), (8, 3), (16, 4), (60, 20))  # sequences of 128 tokens to fit and to select on
REPORT = 24
SETTINGS = {"undamped": QuantcheckSettings(dampings=(0.0,)), "chosen on select": QuantcheckSettings()}


def checked(model: nn.Module, parent: nn.Module, probe: Probe, kind: str) -> dict[str, Any]:
    """Return one row."""
    record = run_quantcheck(Candidate(model, "rounded"), Candidate(parent, "parent"), probe, SETTINGS[kind])
    loss = record.loss
    return {
        "damping": kind,
        "fit_tokens": probe.fit.tokens,
        "select_tokens": probe.select.tokens,
        "report_tokens": probe.report.tokens,
        "damage": round(loss.damage.mean, 4),
        "left": [round(v, 4) for v in (loss.left.mean, loss.left.low, loss.left.high)],
        "kept": loss.kept,
        "complete": record.complete,
    }


def first(split: Split, count: int) -> Split:
    return Split(split.ids[:count], split.mask[:count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["int3", "int2"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHECKPOINTS / "tokenizer")
    openings = [document[:1_500] for document in training_documents()[::12]]
    probe = Probe.from_text(openings, tokenizer, tokens=24_000, in_distribution=True)
    parent = open_model(CHECKPOINTS / "step-02400", device="cpu", with_tokenizer=False).model
    rows = []
    for form in arguments.formats:
        model = copy.deepcopy(parent)
        quantize_(model, form)
        for fit, select in SIZES:
            parts = {"fit": first(probe.fit, fit), "select": first(probe.select, select)}
            part = replace(probe, report=first(probe.report, REPORT), **parts)
            for kind in SETTINGS:
                rows.append({"format": form} | checked(model, parent, part, kind))
                print(rows[-1], flush=True)
    write("quantcheck_tokens", {"rows": rows})


if __name__ == "__main__":
    main()
