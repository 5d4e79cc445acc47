"""Is a damaged block of a model that predicts no next tokens first in the check? Two minutes on one core.

    python benchmarks/batches.py [vit bert t5 t5-encoder]

Small models are trained for seconds: a vision transformer on scikit-learn's digits, a masked BERT on rows that repeat
three ids, two T5s on rows to be turned around (of one the decoder is checked, of the other the encoder), two seeds.
In every one the sign of what one path of one block writes is turned, each path of each block once, and the model is
checked as it is and with each damage. `first` counts where the damaged block has the highest score, `named` where it
is named, `mended` where the best factor on it is below 0 and its interval above the margin. `named_healthy` are the
blocks that the check names in the model as it was trained.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peelwise
from common import RESULTS, write
from peelwise.model.architectures import find_blocks
from peelwise.model.layers import LinearLayer
from peelwise.model.parts import parts_of
from peelwise.tasks.check.run import run_check
from peelwise.tasks.check.settings import CheckSettings

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]
from example_models import IDS, bert, digits, t5, vit  # noqa: E402

Draw = Callable[[int, torch.Generator], dict[str, Tensor]]
EXAMPLES, HELD_OUT = 240, 1_000_000
MODELS: dict[str, tuple[Callable[..., nn.Module], int, float]] = {
    "vit": (vit, 300, 3e-3),
    "bert": (bert, 500, 3e-3),
    "t5": (t5, 700, 5e-3),
    "t5-encoder": (lambda: t5(encoder=5, decoder=2), 700, 5e-3),
}
STACKS = {"t5-encoder": "encoder.block"}  # all others: the list that the architecture says


def drawn_digits(examples: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return images and classes of the first 1,500 digits; those behind them are for the probe."""
    pixels, labels = digits()
    rows = torch.randint(1500, (examples,), generator=generator)
    return {"pixel_values": pixels[rows], "labels": labels[rows]}


def repeating(examples: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return rows of three ids again and again, a fifth of them hidden and asked for."""
    ids = torch.randint(4, IDS, (examples, 3), generator=generator).repeat(1, 4)
    hidden = torch.rand(ids.shape, generator=generator) < 0.2
    hidden[:, 0] = True
    return {"input_ids": ids.masked_fill(hidden, 3), "labels": ids.masked_fill(~hidden, -100)}


def turned(examples: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return rows of eight ids and the same from the last to the first."""
    ids = torch.randint(3, 40, (examples, 8), generator=generator)
    return {"input_ids": ids, "labels": ids.flip(1)}


DRAW: dict[str, Draw] = {"vit": drawn_digits, "bert": repeating, "t5": turned, "t5-encoder": turned}


def trained(name: str, seed: int) -> nn.Module:
    """Return a model trained on batches of 64."""
    make, steps, rate = MODELS[name]
    model = make().train()
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(**DRAW[name](64, generator)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def probe_of(name: str) -> peelwise.Probe:
    """Return a probe of examples that were not trained on, where there are others."""
    if name == "vit":
        pixels, labels = digits()
        batch = {"pixel_values": pixels[1500:][:EXAMPLES], "labels": labels[1500:][:EXAMPLES]}
    else:
        batch = DRAW[name](EXAMPLES, torch.Generator().manual_seed(HELD_OUT))
    return peelwise.Probe.from_batches([batch], in_distribution=True)


def case(
    model: nn.Module, probe: peelwise.Probe, block: int, writer: LinearLayer, settings: CheckSettings
) -> dict[str, Any]:
    """Return what the check says of a model in which the sign of what one layer writes is turned."""
    broken = copy.deepcopy(model)
    module: Any = broken.get_submodule(writer.name)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.neg_()
    record = run_check(broken, probe, settings)
    scores = [each.score or 0.0 for each in record.blocks]
    best = max((w for w in record.gain_witnesses if w.block == block), key=lambda w: w.gain.mean, default=None)
    return {
        "block": block,
        "layer": writer.name,
        "loss": record.loss,
        "first": scores.index(max(scores)) == block,
        "named": any(each.block == block for each in record.unlike or ()),
        "mended": best is not None and best.factor < 0 and best.gain.low > record.margin_nats,
    }


def run(name: str, seed: int) -> dict[str, Any]:
    """Return the cases of one trained model."""
    model, probe = trained(name, seed), probe_of(name)
    settings = CheckSettings(stack=STACKS.get(name))
    healthy = run_check(model, probe, settings)
    # What a path ends with before it is added; the first layer of BERT's MLP is no such path.
    writers = [
        (block.index, branch.writer)
        for block in find_blocks(model, STACKS.get(name))
        for branch in parts_of(block).branches
        if branch.name != "intermediate"
    ]
    cases = [case(model, probe, block, writer, settings) for block, writer in writers]
    counted = {key: sum(each[key] for each in cases) for key in ("first", "named", "mended")}
    found = {"model": name, "seed": seed, "loss": healthy.loss, "cases": len(cases), **counted}
    found["named_healthy"] = [each.block for each in healthy.unlike or ()]
    print(found, flush=True)
    return found | {"damaged": cases}


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or list(MODELS)
    file = RESULTS / "batches.json"
    before = json.loads(file.read_text()) if sys.argv[1:] and file.exists() else {"models": [], "command": None}
    kept = [each for each in before["models"] if each["model"] not in wanted]
    found = [run(name, seed) for name in wanted for seed in (0, 1)]
    write("batches", {"models": [*kept, *found]}, before=before["command"], show=False)
