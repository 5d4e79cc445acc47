"""Train in two processes by the trainers' own ways, for test_trainers: ``torchrun trainers.py OUT WAY``."""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

import peelwise
from audits import tiny_probe
from peelwise.errors import PeelwiseError
from zoo import ZOO, sample_ids

STEPS = 6
ROWS = [{"input_ids": row, "labels": row} for row in sample_ids(64, 17, seed=3)]
OPTIONS: dict[str, Any] = {"budget": None, "schedule": peelwise.every(2), "store": None}
# Trains, watched or not; returns the monitor, if there is one, and the model as it was prepared.
Way = Callable[[Path, bool], tuple[peelwise.Monitor | None, nn.Module]]


def trainer(out: Path, watched: bool, **modes: Any) -> tuple[peelwise.Monitor | None, nn.Module]:
    """Train with the Trainer of transformers, which prepares the model by accelerate."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(out / "trainer"), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-3, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1, **modes,
    )  # fmt: skip
    made = Trainer(ZOO["llama"]().train(), arguments, train_dataset=ROWS)
    callback = peelwise.attach(made, tiny_probe(), **OPTIONS) if watched else None
    made.train()
    return callback and callback.monitor, made.model_wrapped


def zero(out: Path, watched: bool, stage: int) -> tuple[peelwise.Monitor | None, nn.Module]:
    config = {
        "zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    return trainer(out, watched, deepspeed=config)


def accelerated(out: Path, watched: bool) -> tuple[peelwise.Monitor | None, nn.Module]:
    """Train as with ``accelerate launch``: a loop of one's own, the model prepared."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = ZOO["llama"]().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    monitor = peelwise.Monitor(model, tiny_probe(), optimizer=optimizer, **OPTIONS) if watched else None
    for step in range(STEPS):
        ids = torch.stack([row["input_ids"] for row in ROWS[4 * step + 2 * distributed.get_rank() :][:2]])
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        if monitor is not None:
            monitor.step(step, loss=loss)
        optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
    return monitor, model


def lightning(out: Path, watched: bool, strategy: Any) -> tuple[peelwise.Monitor | None, nn.Module]:
    """Train with Lightning."""
    from lightning.pytorch import LightningModule, Trainer

    from peelwise.integrations.lightning import PeelwiseCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = ZOO["llama"]().train()

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    callback = PeelwiseCallback(tiny_probe(), **OPTIONS)
    made = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=STEPS, logger=False,
        callbacks=[callback] if watched else [], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=out,
    )  # fmt: skip
    module = Module()
    made.fit(module, torch.utils.data.DataLoader(ROWS, batch_size=2))
    return (callback.monitor if watched else None), module


WAYS: dict[str, Way] = {
    "trainer-ddp": trainer,
    "accelerate": accelerated,
    "lightning-ddp": partial(lightning, strategy="ddp"),
    "trainer-zero-1": partial(zero, stage=1),
    "trainer-zero-2": partial(zero, stage=2),
}


def refused() -> str:
    """Return why a model of ZeRO-3 is not watched."""
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    engine, *_ = deepspeed.initialize(model=ZOO["llama"](), config=config)
    try:
        peelwise.Monitor(engine, tiny_probe(), store=None)
    except PeelwiseError as error:
        return f"{type(error).__name__}: {error}"
    return "watched"


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo")
    if name == "zero-3":
        found: Any = refused()
    else:
        torch.manual_seed(0)
        monitor, model = WAYS[name](folder, True)
        assert monitor is not None
        last = monitor.last
        told = [event.text for event in monitor.events if event.kind in ("not-measured", "not-followed")]
        assert last is not None, told
        torch.manual_seed(0)
        _, unwatched = WAYS[name](folder, False)
        alone = dict(unwatched.named_parameters())
        same = all(torch.equal(alone[key], weight) for key, weight in model.named_parameters())
        found = {"last": (last.step, last.kind, last.probe_loss, last.letters), "told": told, "same": same}
    (folder / f"{name}-{distributed.get_rank()}.pickle").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main()
