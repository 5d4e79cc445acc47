"""Peels of the ternary GPTs at the same bits and with dense references: what the bits of a stack cost.

The finished models of examples/small_gpt/low_bit.py, and the tuned one with the codes of block 3's output projections
negated, on openings of their training documents. Every model is peeled twice along the same maps: references inside
its format, and dense ones. The difference of the two is the price of precision of the stack.

Example: python benchmarks/peel_formats.py --models ternary-stuck --no-controls
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

import peelwise
from common import earlier, write
from peelwise.model.checkpoints import open_model
from peelwise.records.base import Interval

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from small_gpt.text import training_documents  # noqa: E402

GPT = EXAMPLES / "small_gpt"
DAMAGED = "ternary-tuned, block 3 negated"
MODELS = ("ternary-stuck", DAMAGED, "ternary-tuned")
MAPS = ((1, 2, 3, 4, 5, 6), (1, 2, 4, 4, 5, 6), (1, 2, 5, 5, 5, 6), (1, 2, 3, 4, 6, 6), (6,) * 6)


def opened(name: str) -> nn.Module:
    """Return one of the models."""
    model = open_model(GPT / "low_bit" / name.split(",")[0], device="cpu", with_tokenizer=False).model
    if name == DAMAGED:
        block = model.model.layers[3]
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            encoded = layer.encoded()
            layer.hold_(replace(encoded, codes=-encoded.codes))
    return model


def probe_of(tokens: int) -> peelwise.Probe:
    """Return openings of every twelfth training document."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(GPT / "checkpoints" / "tokenizer")
    openings = [document[:1_500] for document in training_documents()[::12]]
    return peelwise.Probe.from_text(openings, tokenizer, tokens=tokens, in_distribution=True, source="training text")


def peeled(name: str, probe: peelwise.Probe, *, dense: bool, controls: bool) -> dict[str, Any]:
    """Return what a peel found."""
    settings = peelwise.PeelSettings("60m", MAPS, dense_references=dense, controls=controls)
    report = peelwise.peel(opened(name), probe, settings, name=name)
    record, loss = report.record, report.record.loss
    print(report, flush=True)
    return {
        "model": name,
        "references": "dense" if dense else record.reference_formats,
        "current": loss.current,
        "head_control": loss.head_control,
        "bound": loss.bound,
        "best_map": record.best_map,
        "over_head_control": of(loss.over_head_control),
        "over_model": of(loss.bound_gain),
        "shuffled": loss.shuffled,
        "untrained": loss.untrained,
        "informative": record.informative,
        "maps": [
            {
                "stations": one.stations,
                "report": (one.loss or one.own_head).report,
                "own_head": one.own_head.report,
                "over_head": of(one.gain_over_head),
                "unexplained": [round(v, 5) for v in one.unexplained],
            }
            for one in record.maps
        ],
        "seconds": round(record.cost.wall_seconds, 1),
    }


def of(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [round(v, 4) for v in (interval.mean, interval.low, interval.high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=9600)
    parser.add_argument("--controls", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--add", action="store_true", help="to the results that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    probe = probe_of(arguments.tokens)
    kinds = [(name, dense) for name in arguments.models for dense in (False, True)]
    rows = [peeled(name, probe, dense=dense, controls=arguments.controls) for name, dense in kinds]
    tokens = {"fit": probe.fit.tokens, "select": probe.select.tokens, "report": probe.report.tokens}
    kept = earlier("peel_formats") if arguments.add else {}
    write("peel_formats", {"tokens": tokens, "peels": kept.get("peels", []) + rows}, before=kept.get("command"))


if __name__ == "__main__":
    main()
