"""What two processes do with a model that is spread over them, by day and night: ``torchrun shards.py OUT WHEN``.

What each of them found goes to ``OUT/RANK.pt``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

import peelwise
from audits import ONE_ROUND, tiny_probe
from distributed import two
from peelwise.distributed import watch
from peelwise.model import runner
from peelwise.model.architectures import find_blocks
from peelwise.model.parts import parts_of
from peelwise.nn import quantize_
from zoo import COMMON, ZOO, _transformer, sample_ids

NAMES = {"day": ("llama",), "night": ("gpt2", "plain", "mixtral", "deep")}
CHECKED = {"day": ("deep",), "night": ("gpt2", "mixtral")}
# Blocks enough to compare over depth, one of which writes with the wrong sign.
MODELS = ZOO | {"deep": _transformer("LlamaConfig", **COMMON | {"num_hidden_layers": 6})}
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
    model = wrap(model_of(name))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = peelwise.audit(model, tiny_probe(in_distribution=True), ONE_ROUND)
    after = model.state_dict()
    same = all(bool((after[key] == tensor).all()) for key, tensor in before.items())
    return report.record.model_dump(), report.witness, same


def checked(name: str, wrap: Callable[[nn.Module], nn.Module] = lambda model: model, *, text: bool = True) -> Any:
    """Return the record of a check, with proofs for blocks that stand out, or of weights alone."""
    model = wrap(model_of(name))
    return peelwise.check(model, tiny_probe() if text else None).record.model_dump()


def model_of(name: str) -> nn.Module:
    """Return a model in float64 if it can be, of several blocks one of which writes with the wrong sign."""
    model = MODELS[name]() if name in IN_FLOAT32 else MODELS[name]().double()
    if name == "deep":
        with torch.no_grad():
            parts_of(find_blocks(model)[3]).branches[0].writer.module.weight.mul_(-3)
    return model


def at_call(work: Callable[[], Any], number: int = 1) -> Callable[..., None]:
    """Return what does something in the second process when it is called so often, and nothing before."""
    calls = count(1)

    def called(*_: Any) -> None:
        if distributed.get_rank() == 1 and next(calls) == number:
            work()

    return called


def failed(model: nn.Module, work: Callable[[], Any]) -> dict[str, Any]:
    """Return what is said of some work with a model that fails in one process, how long it took, and what is left."""
    ids = sample_ids(2, 9)
    with torch.no_grad():
        before = model(ids)
        began = time.monotonic()
        words = two.said(work)
        seconds = time.monotonic() - began
        return {"said": words, "seconds": seconds, "same": torch.equal(before, model(ids))}


def in_a_block(probe: peelwise.Probe) -> dict[str, Any]:
    """An audit fails in one process in the middle of a block, while the whole model runs."""
    model = sharded(ZOO["plain"]())
    linear = find_blocks(model)[1].linears[0].module
    with handle_of(linear.register_forward_hook(at_call(two.divide, 7))):
        return failed(model, lambda: peelwise.audit(model, probe, ONE_ROUND))


def between_passes(probe: peelwise.Probe) -> dict[str, Any]:
    """An audit fails in one process after a block's pass forward, before the pass back for which it is gathered."""
    kept, fail = runner.differentiable, at_call(two.divide, 5)
    runner.differentiable = lambda *args: fail() or kept(*args)
    model = sharded(ZOO["plain"]())
    try:
        return failed(model, lambda: peelwise.audit(model, probe, ONE_ROUND))
    finally:
        runner.differentiable = kept


def in_training(probe: peelwise.Probe) -> dict[str, Any]:
    """A measurement of a monitor fails in one process in the middle of a block; both train on."""
    model = sharded(ZOO["plain"]().train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    measured, losses = [], []
    with peelwise.Monitor(model, probe, budget=None, schedule=peelwise.every(1), store=None) as monitor:
        linear = find_blocks(model)[1].linears[0].module
        for step in range(5):
            loss = model(sample_ids(2, 9, seed=step)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
            with handle_of(linear.register_forward_hook(at_call(two.divide, 3) if step == 1 else lambda *_: None)):
                measured.append(monitor.step(step) is not None)
        events = [event.text for event in monitor.events if event.kind == "not-measured"]
    return {"measured": measured, "losses": losses, "events": events}


@contextmanager
def handle_of(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def low_bit() -> nn.Module:
    model = ZOO["qwen2"]()
    quantize_(model, "int2:group=16,affine", skip=("down_proj",))
    return model


def ends(meeting: Path, how: str) -> list[tuple[int, str, str]]:
    """Start both without torchrun, which would end the first with the second; return code, output and errors of each.

    Args:
        meeting: a file through which they find each other.
        how: what the second does in the middle of an audit, ``lost``.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(meeting), how],
            env=environment | {"RANK": rank, "WORLD_SIZE": "2"},
            **options,
        )
        for rank in "01"
    ]
    told = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *each) for process, each in zip(processes, told, strict=True)]


def no_room() -> None:
    raise MemoryError("no room for a block")


def lost(how: str) -> str:
    """Return what is said of an audit in the middle of which the second process ends, or cannot gather a block."""
    watch._PATIENCE = 2.0
    model = sharded(ZOO["plain"]())
    if how == "killed":
        linear = find_blocks(model)[1].linears[0].module
        linear.register_forward_hook(at_call(lambda: os.kill(os.getpid(), signal.SIGKILL), 7))
    else:
        kept, fail = FSDPParamGroup.unshard, at_call(no_room, 40)

        def unshard(self: Any, *args: Any, **options: Any) -> Any:
            if not self.is_unsharded:  # else there is nothing to gather
                fail()
            return kept(self, *args, **options)

        FSDPParamGroup.unshard = unshard
    return two.said(lambda: peelwise.audit(model, tiny_probe(), ONE_ROUND))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    out, when = Path(sys.argv[1]), sys.argv[2]
    if when not in NAMES:
        rank, of_all = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        distributed.init_process_group("gloo", init_method=f"file://{out}", rank=rank, world_size=of_all)
        print(lost(when), flush=True)
        os._exit(0)
    distributed.init_process_group("gloo")
    found: dict[str, Any] = {name: (audited(name, sharded), audited(name)) for name in NAMES[when]}
    if when == "day":
        probe, plain = tiny_probe(), ZOO["plain"]
        found["low-bit"] = two.said(lambda: peelwise.audit(sharded(low_bit()), probe, ONE_ROUND))
        found["all at once"] = two.said(lambda: peelwise.audit(fully_shard(plain()), probe, ONE_ROUND))
        found |= {each.__name__: each(probe) for each in (in_a_block, between_passes, in_training)}
        found["peel"] = two.said(lambda: peelwise.peel(sharded(plain()), probe))
    for name in CHECKED[when]:
        found[f"checked {name}"] = checked(name, sharded), checked(name)
        found[f"weights of {name}"] = checked(name, sharded, text=False), checked(name, text=False)
    torch.save(found, out / f"{distributed.get_rank()}.pt")
    distributed.destroy_process_group()
