"""Commands in the processes of torchrun: they share the work, and the first one speaks for all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

from peelwise.errors import DeviceError, OptionError

_SHARING = ("audit", "check")


def started() -> int:
    """Return how many processes torchrun has started; 1 without it."""
    # Clusters set WORLD_SIZE for whatever runs in them; the other name is torchrun's own.
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def check_shares(command: str | None) -> None:
    """Check that a command can be run in several processes, if there are.

    Raises:
        OptionError: If it cannot.
    """
    if started() > 1 and command not in (None, *_SHARING):
        raise OptionError(
            f"peelwise {command} runs in one process, and torchrun has started {started()}: leave torchrun out. Of all "
            f"commands, {' and '.join(_SHARING)} share their work."
        )


@contextmanager
def one_voice() -> Iterator[None]:
    """Let processes other than the first say nothing, and end without an exit code; what is unforeseen they raise.

    torchrun ends all as soon as one of them ends with a code: the first one is to have said why.
    """
    if started() == 1 or os.environ["RANK"] == "0":
        yield
        return
    with (
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
        suppress(SystemExit),
    ):
        yield


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Let the processes of torchrun be one group meanwhile: on GPUs, one for each, or on CPUs.

    Args:
        device: where models run, as the command line has it.

    Raises:
        DeviceError: If that cannot be one for each process.
    """
    count = started()
    if count == 1:
        yield
        return
    import torch
    from torch import distributed

    if device not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"Each of {count} processes runs on a device of its own: --device cuda or cpu, not {device}.")
    on_gpus = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpus:
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise DeviceError(
                f"{here} processes run on this machine and it has {gpus} GPUs: start as many as those, or use "
                "--device cpu."
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()
