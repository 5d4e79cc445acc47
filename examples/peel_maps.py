"""Peel maps over the training of the small GPT: training loss against what stacks of references reach.

    python examples/peel_maps.py [--out docs/figures] [--tokens 9600] [--quick]

Makes two figures and prints every number that docs/peel-maps.md quotes. About eight minutes of one core.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import peelwise
from peelwise.model.fresh import fresh_copy
from peelwise.records.peel import PeelRecord
from peelwise.references.map_search import direct_map, named_maps, neighbours
from peelwise.show.views import conclusion

matplotlib.use("Agg")
from matplotlib import pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "peelwise"  # the same file at every run
HERE = Path(__file__).resolve().parent
CHECKPOINTS = HERE / "small_gpt" / "checkpoints"
sys.path.insert(0, str(HERE))  # run from anywhere

from small_gpt.text import training_documents  # noqa: E402

DAMAGED = 3


def stages(quick: bool) -> dict[int, nn.Module]:
    """Training step -> model; step 0 is the same architecture at initialisation."""
    found = {}
    for folder in sorted(CHECKPOINTS.glob("step-*")):
        found[int(folder.name.split("-")[1])] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    untrained = fresh_copy(found[max(found)], 0)
    assert untrained is not None
    return {0: untrained, **({} if quick else found)}


def training_probe(tokens: int) -> peelwise.Probe:
    """Openings of every twelfth training document: the optimisation claim uses training text."""
    tokenizer = AutoTokenizer.from_pretrained(sorted(CHECKPOINTS.glob("step-*"))[-1])
    openings = [document[:1_500] for document in training_documents()[::12]]
    return peelwise.Probe.from_text(openings, tokenizer, tokens=tokens, in_distribution=True, source="training text")


def sign_flipped(model: nn.Module) -> nn.Module:
    """Let one block subtract what it should add: no singular value of any matrix changes."""
    with torch.no_grad():
        block = model.model.layers[DAMAGED]
        block.self_attn.o_proj.weight.neg_()
        block.mlp.down_proj.weight.neg_()
    return model


def draw_curves(records: dict[int, PeelRecord], path: Path) -> None:
    """Above the losses; below, enlarged, what every map has over the model with its head fitted again."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.8, 6.4), sharex=True)
    places = range(len(records))  # stages lie decades apart, so they are evenly spaced
    found = list(records.values())
    for kind, colour, label in (("single", "C0", "one station left out"), ("other", "0.7", "named families")):
        for number, stations in enumerate(m for m in sorted(one.stations for one in found[0].maps)):
            if (len(set(stations)) >= len(stations) - 1) == (kind == "single"):
                ones = [next(m for m in record.maps if m.stations == stations) for record in found]
                top.plot(places, [(m.loss or m.own_head).report for m in ones], color=colour, linewidth=0.8, alpha=0.6)
                gains = [m.gain_over_head for m in ones]
                errors = [[g.mean - g.low for g in gains], [g.high - g.mean for g in gains]]
                shifted = [place + 0.02 * (number - 6) for place in places]
                bottom.errorbar(shifted, [g.mean for g in gains], errors, color=colour, linewidth=0.8, capsize=1.5)
        bottom.plot([], [], color=colour, label=label)
    top.plot(places, [r.loss.shuffled for r in found], "C1:", linewidth=2, label="control: shuffled targets")
    top.plot(places, [r.loss.untrained for r in found], "C7:", linewidth=2, label="control: untrained")
    top.plot(places, [r.loss.current for r in found], "k-o", label="model")
    top.plot(places, [r.loss.head_control for r in found], "C2--s", markersize=4, label="model, head fitted again")
    top.plot(places, [r.loss.bound for r in found], "C3^", markersize=7, fillstyle="none", label="best map")
    top.set(ylabel="loss on report, nats per token", title="Peel maps over training")
    bottom.axhline(0, color="C2", linestyle="--", linewidth=1.2, label="model, head fitted again")
    bottom.set_xticks(places, [str(step) for step in records])
    bottom.set_yscale("symlog", linthresh=0.1)
    bottom.set(xlabel="training step", ylabel="gain over the head control, 95 % paired")
    bottom.legend(fontsize=8, loc="lower left")
    save(figure, top, path)


def draw_damage(record: PeelRecord, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.8, 3.2))
    blocks = [block for block in record.blocks if block.lost_nats is not None]
    means = [b.lost_nats.mean for b in blocks]
    errors = [
        [b.lost_nats.mean - b.lost_nats.low for b in blocks],
        [b.lost_nats.high - b.lost_nats.mean for b in blocks],
    ]
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.errorbar([b.index for b in blocks], means, errors, fmt="o", capsize=3, label="95 % paired")
    axes.axvspan(DAMAGED - 0.4, DAMAGED + 0.4, color="#f2c9c4", linewidth=0, label="damaged block")
    axes.set_xticks([b.index for b in blocks])
    axes.set(xlabel="block whose station is left out as a target", ylabel="lost, nats per token")
    axes.set_title(f"Output projections of block {DAMAGED} negated")
    save(figure, axes, path)


def save(figure: plt.Figure, axes: plt.Axes, path: Path) -> None:
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def tell(title: str, record: PeelRecord) -> None:
    """Print what the page quotes."""
    loss = record.loss
    print(f"\n{title}: {conclusion(record)}")
    print(f"  model {loss.current:.4f}, head control {loss.head_control:.4f}, bound {loss.bound:.4f} {record.best_map}")
    over = loss.over_head_control
    print(
        f"  over head control {over.mean:+.4f} [{over.low:+.4f}, {over.high:+.4f}], informative: {record.informative}"
    )
    print(f"  shuffled {loss.shuffled:.4f}, untrained {loss.untrained:.4f}, {record.cost.wall_seconds:.0f} s")
    for one in record.maps:
        gain = one.gain_over_head
        print(
            f"  {one.stations} {one.name:16} {one.loss.report:.4f} {gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
        )
    for block in record.blocks:
        lost = block.lost_nats
        if lost is not None:
            print(f"  block {block.index}: {lost.mean:+.4f} [{lost.low:+.4f}, {lost.high:+.4f}] {block.verdict}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "figures")
    parser.add_argument("--tokens", type=int, default=9_600)
    parser.add_argument("--quick", action="store_true", help="only the untrained model, two maps")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    probe = training_probe(options.tokens)
    direct = direct_map(6)
    maps = [direct, (6,) * 6] if options.quick else list(dict.fromkeys([*named_maps(6), *neighbours(direct)]))
    settings = peelwise.PeelSettings("1h", maps, rounds=1 if options.quick else None)
    records = {}
    for step, model in stages(options.quick).items():
        records[step] = peelwise.peel(model, probe, settings, name=f"step {step}").record
        tell(f"step {step}", records[step])
    draw_curves(records, options.out / "peel-training.svg")
    broken = sign_flipped(stages(False)[2400])
    chosen = maps if options.quick else [*maps, (1, 2, 5, 5, 5, 6), (1, 4, 4, 4, 5, 6), (1, 2, 6, 6, 6, 6)]
    record = peelwise.peel(broken, probe, replace(settings, maps=chosen), name="damaged").record
    tell(f"step 2400, block {DAMAGED} negated", record)
    draw_damage(record, options.out / "peel-damage.svg")


if __name__ == "__main__":
    main()
