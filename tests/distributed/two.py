"""What two processes do together, for tests of the day and the night: ``torchrun two.py OUT (day | night)``.

What each of them found goes to ``OUT/RANK.pt``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import peelwise
from audits import ONE_ROUND, split_of, tiny_probe
from peelwise.distributed.processes import Processes, current_processes
from peelwise.engine import clock
from peelwise.engine.sweep import sweep
from peelwise.errors import PeelwiseError
from peelwise.model.architectures import find_blocks
from peelwise.model.experts import experts_called
from peelwise.model.runner import Runner
from peelwise.nn import quantize_
from peelwise.tasks.audit import stages
from zoo import ZOO, sample_ids

LENGTHS = {"ragged": (13, 9, 13, 6, 11), "fewer than processes": (12,)}
SWEPT = (("plain", "ragged"), ("llama", "fewer than processes"), ("mixtral", "ragged"))
# In readings of the first process's clock, of which the whole audit takes 45.
BUDGETS = {"day": (16.0,), "night": (4.0, 10.0, 22.0, 28.0, 34.0, 40.0)}


def run(folder: Path, *arguments: str, script: str = __file__) -> list[dict[str, Any]]:
    """Start both, which write into a folder, and return what each found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, folder]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command), *arguments], capture_output=True, text=True, env=environment, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def swept(name: str, which: str, processes: Processes) -> Any:
    """Return losses, losses from block 1 on, and signals, steps and changes by block, direction and layer."""
    rows = [sample_ids(1, length, seed=length).flatten().tolist() for length in LENGTHS[which]]
    split, model = split_of(rows), ZOO[name]().requires_grad_(False)
    with experts_called(model):
        runner = Runner(model, find_blocks(model), micro_batch_tokens=30, processes=processes)
        trace = runner.trace(split)
        (found,) = sweep(runner, trace, trace)
        losses = runner.losses_from(trace, 1)
    layers = {
        (index, direction, linear.name): (proposal.slope, proposal.damping, proposal.change)
        for index, made in found.items()
        for direction, maps in made.changes.items()
        for linear, proposal in maps.items()
    }
    return trace.losses, losses, {index: made.signals for index, made in found.items()}, layers


def model_of(name: str) -> nn.Module:
    """Return a tiny model: in float64, where sums in another order change next to nothing, or a low-bit one."""
    if name != "low-bit":
        return ZOO[name]().double()
    torch.manual_seed(0)
    model = ZOO["qwen2"]()
    quantize_(model, "int2:group=16,affine", skip=("down_proj",))
    return model


def audited(name: str) -> Any:
    """Return the record of an audit of all stages, in as many processes as there are."""
    report = peelwise.audit(model_of(name), tiny_probe(in_distribution=True), ONE_ROUND)
    return report.record.model_dump(), report.witness


@contextmanager
def ticking(per_reading: float) -> Any:
    """Let the clock of audits advance by so many seconds whenever it is read."""
    kept, readings = clock.time, count()

    class Time:
        @staticmethod
        def monotonic() -> float:
            return per_reading * next(readings)

    clock.time = Time
    try:
        yield
    finally:
        clock.time = kept


def ended(budget: float) -> Any:
    """Return the record of an audit whose budget ends, by a clock that is seven times as fast in the second process."""
    with ticking(7.0 if distributed.is_initialized() and distributed.get_rank() else 1.0):
        report = peelwise.audit(ZOO["plain"]().double(), tiny_probe(), replace(ONE_ROUND, budget=budget))
    return report.record.model_dump()


@contextmanager
def at(stage: str, act: Callable[[], None], rank: int) -> Any:
    """Let one process do something of its own before a stage."""
    kept = getattr(stages, stage)

    def changed(*args: Any, **options: Any) -> Any:
        if distributed.get_rank() == rank:
            act()
        return kept(*args, **options)

    setattr(stages, stage, changed)
    try:
        yield
    finally:
        setattr(stages, stage, kept)


def said(work: Callable[[], Any]) -> str:
    """Return what an audit that cannot be made says."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}{'' if isinstance(error, PeelwiseError) else ' (unforeseen)'}: {error}"
    return "nothing"


def divide() -> None:
    raise ZeroDivisionError("nothing to divide by")


def seeded(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = ZOO["plain"]()
    with torch.no_grad():
        next(model.parameters()).add_(1e-3 * seed)
    return model


def by_day(out: Path) -> dict[str, Any]:
    """Share sweeps and an audit; end in other ways than by itself."""
    rank, probe, plain = distributed.get_rank(), tiny_probe(), ZOO["plain"]
    together = current_processes()
    found: dict[str, Any] = {"swept": {case: swept(*case, together) for case in SWEPT}}
    together.close()
    found["audited"] = audited("llama")
    with at("leave_one_out", divide, rank=1):
        found["failed"] = said(lambda: peelwise.audit(plain(), probe, ONE_ROUND))
    with at("leave_one_out", lambda: os.kill(os.getpid(), signal.SIGINT), rank=1):
        found["stopped"] = peelwise.audit(plain(), probe, ONE_ROUND).record.model_dump()
    found["other model"] = said(lambda: peelwise.audit(seeded(rank), probe, ONE_ROUND))
    found["other probe"] = said(lambda: peelwise.audit(plain(), tiny_probe(seed=rank), ONE_ROUND))
    return found


def by_night(out: Path) -> dict[str, Any]:
    """Share audits of other models, and what a user may do wrong."""
    rank, probe, plain = distributed.get_rank(), tiny_probe(), ZOO["plain"]
    found: dict[str, Any] = {"audited": audited("low-bit")}
    found["no model"] = said(lambda: peelwise.audit(plain() if rank == 0 else "/nowhere", probe, ONE_ROUND))
    told: list[Any] = []
    model, folder = DistributedDataParallel(plain()), out / "certificate"
    found["replicated"] = peelwise.audit(model, probe, ONE_ROUND, out=folder, progress=told.append).record.model_dump()
    found["told"] = len(told)
    found["taken"] = said(lambda: peelwise.audit(model, probe, ONE_ROUND, out=folder))
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo")
    folder, time_of_day = Path(sys.argv[1]), sys.argv[2]
    everything = {"day": by_day, "night": by_night}[time_of_day](folder)
    everything["ended"] = {budget: ended(budget) for budget in BUDGETS[time_of_day]}
    torch.save(everything, folder / f"{distributed.get_rank()}.pt")
    distributed.destroy_process_group()
