"""What two processes do with a model that is spread over them, by day and night: ``torchrun shards.py OUT WHEN``.

What each of them found goes to ``OUT/RANK.pt``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import peelwise
from audits import ONE_ROUND, tiny_probe
from distributed import two
from peelwise.model.architectures import find_blocks
from peelwise.nn import quantize_
from zoo import ZOO

NAMES = {"day": ("llama",), "night": ("gpt2", "plain", "mixtral")}
IN_FLOAT32 = ("mixtral",)  # transformers' grouped products know no float64


def run(folder: Path, time_of_day: str) -> list[dict[str, Any]]:
    """Start both, which write into a folder, and return what each found."""
    return two.run(folder, time_of_day, script=__file__)


def sharded(model: nn.Module) -> nn.Module:
    """Spread a model over both, as its trainer does."""
    for block in find_blocks(model):
        fully_shard(block.module)
    return fully_shard(model)


def audited(name: str, wrap: Callable[[nn.Module], nn.Module] = lambda model: model) -> Any:
    """Return record and witness of an audit of all stages, and whether the model was left as it was."""
    model = ZOO[name]()
    model = wrap(model if name in IN_FLOAT32 else model.double())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = peelwise.audit(model, tiny_probe(in_distribution=True), ONE_ROUND)
    after = model.state_dict()
    same = all(bool((after[key] == tensor).all()) for key, tensor in before.items())
    return report.record.model_dump(), report.witness, same


def low_bit() -> nn.Module:
    model = ZOO["qwen2"]()
    quantize_(model, "int2:group=16,affine", skip=("down_proj",))
    return model


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo")
    out, when = Path(sys.argv[1]), sys.argv[2]
    found: dict[str, Any] = {name: (audited(name, sharded), audited(name)) for name in NAMES[when]}
    if when == "day":
        probe, plain = tiny_probe(), ZOO["plain"]
        found["low-bit"] = two.said(lambda: peelwise.audit(sharded(low_bit()), probe, ONE_ROUND))
        found["all at once"] = two.said(lambda: peelwise.audit(fully_shard(plain()), probe, ONE_ROUND))
        found["check"] = two.said(lambda: peelwise.check(sharded(plain()), probe))
    torch.save(found, out / f"{distributed.get_rank()}.pt")
    distributed.destroy_process_group()
