"""Which block is at fault? One model five times: healthy, damaged in three ways, and damaged but with too little text.

    python examples/find_the_fault.py [--out docs/figures] [--tokens 9600] [--quick]

Makes the figure of docs/method.md and prints its numbers. About five minutes of one core.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import peelwise
from peelwise.records.audit import AuditRecord
from peelwise.records.base import Interval
from peelwise.show.views import conclusion

matplotlib.use("Agg")
from matplotlib import pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "peelwise"  # the same file at every run
HERE = Path(__file__).resolve().parent
CHECKPOINTS = HERE / "small_gpt" / "checkpoints"
sys.path.insert(0, str(HERE))  # run from anywhere

from small_gpt.text import training_documents  # noqa: E402

DAMAGED = 3
COLOURS = {"red": "#c9372c", "yellow": "#d9a400", "green": "#2f8f4e", "grey": "#8a8f98"}


def healthy(model: nn.Module) -> None:
    """Leave the model as it is."""


def sign_flip(model: nn.Module) -> None:
    """Let the block subtract what it should add: no singular value changes."""
    block = model.model.layers[DAMAGED]
    block.self_attn.o_proj.weight.neg_()
    block.mlp.down_proj.weight.neg_()


def rounded_to_2_bits(model: nn.Module) -> None:
    """Round every matrix of the block to four levels per output."""
    for module in model.model.layers[DAMAGED].modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.abs().amax(dim=1, keepdim=True) / 1.5
            module.weight.copy_(((module.weight / scale - 0.5).round().clamp(-2, 1) + 0.5) * scale)


def copied_neighbour(model: nn.Module) -> None:
    """Give the block the weights of the one before it."""
    layers = model.model.layers
    layers[DAMAGED].load_state_dict(layers[DAMAGED - 1].state_dict())


# Title, what is done to the model, share of the text
CASES: tuple[tuple[str, Callable[[nn.Module], None], float], ...] = (
    ("healthy", healthy, 1.0),
    ("signs flipped", sign_flip, 1.0),
    ("rounded to 2 bits", rounded_to_2_bits, 1.0),
    ("copy of the block before", copied_neighbour, 1.0),
    ("2 bits, a fifth of the text", rounded_to_2_bits, 0.2),
)


def training_probe(tokens: int) -> peelwise.Probe:
    """Openings of every twelfth training document."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "step-02400")
    openings = [document[:1_500] for document in training_documents()[::12]]
    return peelwise.Probe.from_text(openings, tokenizer, tokens=tokens, in_distribution=True, source="training text")


def draw(records: dict[str, AuditRecord], path: Path) -> None:
    """Draw a column per case; rows: natural-gradient score, solo gain, marginal gain; colours are verdicts."""
    figure, axes = plt.subplots(3, len(records), figsize=(2.5 * len(records), 6.2), squeeze=False, sharex=True)
    for column, (title, record) in zip(axes.T, records.items(), strict=True):
        places = [block.index for block in record.blocks]
        colours = [COLOURS[block.verdict] for block in record.blocks]
        column[0].bar(places, [block.natural_energy or 0.0 for block in record.blocks], color="#2f6db5")
        with_interval(column[1], [block.recoverable_nats for block in record.blocks], colours)
        with_interval(column[2], [block.unique_nats for block in record.blocks], colours)
        column[0].set_title(title, fontsize=10)
        column[2].set_xlabel("block", fontsize=9)
        column[2].set_xticks(places)
        for axis in column:
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            if title != "healthy":
                axis.axvspan(DAMAGED - 0.5, DAMAGED + 0.5, color="0.9", linewidth=0, zorder=0)
    for axis, label in zip(
        axes[:, 0], ("natural-gradient score", "solo gain, nats", "marginal gain, nats"), strict=True
    ):
        axis.set_ylabel(label, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def with_interval(axis: plt.Axes, found: list[Interval | None], colours: list[str]) -> None:
    """Draw a bar with its 95 % interval for each block that was measured."""
    for place, (one, colour) in enumerate(zip(found, colours, strict=True)):
        if one is not None:
            error = [[one.mean - one.low], [one.high - one.mean]]
            axis.bar(place, one.mean, yerr=error, color=colour, capsize=2, error_kw={"linewidth": 0.9})
    axis.axhline(0, color="0.4", linewidth=0.8)


def tell(title: str, record: AuditRecord) -> None:
    """Print what the page quotes."""
    print(f"\n{title}: loss {record.loss.current:.4f}. {conclusion(record)}")
    for block in record.blocks:
        solo, marginal = shown(block.recoverable_nats), shown(block.unique_nats)
        score = f"natural-gradient score {block.natural_energy:7.3f}"
        print(f"  block {block.index} {block.verdict:6} {score}  solo gain {solo}  marginal gain {marginal}")


def shown(one: Interval | None) -> str:
    return "not measured" if one is None else f"{one.mean:+.4f} [{one.low:+.4f}, {one.high:+.4f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "figures")
    parser.add_argument("--tokens", type=int, default=9_600)
    parser.add_argument("--quick", action="store_true", help="two cases, one round")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    whole = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "step-02400", dtype=torch.float32).eval()
    joint, alone = (1, 1) if options.quick else (3, 2)
    records = {}
    for title, damage, share in CASES[:2] if options.quick else CASES:
        model = copy.deepcopy(whole)
        with torch.no_grad():
            damage(model)
        probe = training_probe(round(share * options.tokens))
        report = peelwise.audit(model, probe, peelwise.AuditSettings("1h", joint, alone, controls=False), name=title)
        records[title] = report.record
        tell(title, report.record)
    draw(records, options.out / "find-the-fault.svg")


if __name__ == "__main__":
    main()
