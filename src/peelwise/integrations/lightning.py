"""The monitor in Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peelwise.api.monitor import Monitor, tell_unmonitored
from peelwise.errors import MissingExtraError
from peelwise.probe.probe import Probe

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingExtraError("Watching Lightning's Trainer", "lightning") from error


class PeelwiseCallback(Callback):  # type: ignore[misc]
    """Calls `Monitor.step` after every step of the optimiser, and gives what was found to the trainer's loggers.

    Args:
        probe: text or batches to measure on; see `Probe`.
        model: takes the model that the probe is for (token ids in, logits out, say) from the module; by
            default its attribute ``model`` if that is a module, else the module itself.
        options: of `Monitor`: ``budget``, ``store`` and so on.

    Attributes:
        monitor: the monitor, from the beginning of training on.

    Example:
        >>> Trainer(callbacks=[PeelwiseCallback(probe, budget=0.03, store="run.db")]).fit(module, batches)
    """

    def __init__(
        self, probe: Probe, *, model: Callable[[LightningModule], nn.Module] | None = None, **options: Any
    ) -> None:
        self._probe, self._options = probe, options
        self._model_of = model or _own_model
        self.monitor: Monitor | None = None
        self._step = 0
        self._losses: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the monitor, in all processes."""
        optimizer = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
        try:
            self.monitor = Monitor(self._model_of(pl_module), self._probe, optimizer=optimizer, **self._options)
        except Exception as error:  # a monitor must never end a training
            tell_unmonitored(self._model_of(pl_module), self._probe, error, **self._options)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step the monitor where the optimiser has stepped; this comes for every micro-batch."""
        if self.monitor is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            # Lightning has divided it by the number of micro-batches. It is read later, so that no step waits for it.
            self._losses.append(torch.as_tensor(loss).detach().float().reshape(()))
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        found = self.monitor.step(self._step, loss=torch.stack(self._losses).sum() if self._losses else None)
        self._losses.clear()
        if found is not None:
            for logger in trainer.loggers:
                logger.log_metrics({"peelwise/share": self.monitor.share, **found.scalars()}, step=self._step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run in the history."""
        self._close("finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the run in the history as one that failed."""
        self._close("failed")

    def _close(self, status: Literal["finished", "failed"]) -> None:
        if self.monitor is not None:
            self.monitor.close(status)


def _own_model(module: LightningModule) -> nn.Module:
    inner = getattr(module, "model", None)
    return inner if isinstance(inner, nn.Module) else module
