"""The monitor in the Trainer of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peelwise.api.monitor import Monitor, tell_unmonitored
from peelwise.engine.opening import checked_blocks
from peelwise.errors import MissingExtraError, OptionError
from peelwise.probe.probe import Probe

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise MissingExtraError("Watching the Trainer of transformers", "hf") from error


class PeelwiseCallback(TrainerCallback):  # type: ignore[misc]
    """Calls `Monitor.step` after every step of the optimiser, and adds what was found to the logs.

    Use `attach`, which puts it in front of the reporters: behind them, they would not see what it adds.

    Args:
        probe: text or batches to measure on.
        options: of `Monitor`.

    Attributes:
        monitor: the monitor, from the beginning of training on.
    """

    def __init__(self, probe: Probe, **options: Any) -> None:
        self._probe, self._options = probe, options
        self.monitor: Monitor | None = None
        self._losses: list[Tensor] = []  # of the micro-batches of this step
        self._logged_loss: float | None = None
        self._logged_step: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        """Start the monitor, in all processes; only now there is an optimiser."""
        if self.monitor is not None:
            self.monitor.close("failed")  # training that ended in an error has not told so
            self.monitor = None
        try:
            self.monitor = Monitor(found["model"], self._probe, optimizer=found.get("optimizer"), **self._options)
        except Exception as error:  # a monitor must never end a training
            tell_unmonitored(found["model"], self._probe, error, **self._options)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        """Step the monitor while gradients are still there; the trainer counts the step only afterwards."""
        losses, self._losses = self._losses, []
        if self.monitor is not None:
            # The trainer has divided each by the number of micro-batches, or by that of all their tokens.
            loss = torch.stack(losses).sum() if losses else self._logged_loss
            self._logged_loss = None
            self.monitor.step(state.global_step + 1, loss=loss)

    def keep(self, loss: Tensor) -> None:
        """Keep the loss of a micro-batch, unread: the trainer itself reads it only when it logs."""
        if self.monitor is not None:
            self._losses.append(loss.detach().float().reshape(()))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **found: Any) -> None:
        """Add the numbers of a new measurement to the logs; take the loss from them where no other is had."""
        if self.monitor is None or logs is None or "loss" not in logs:
            return
        self._logged_loss = float(logs["loss"])
        logs["peelwise/share"] = self.monitor.share
        last = self.monitor.last
        if last is not None and last.step != self._logged_step:
            self._logged_step = last.step
            logs.update(last.scalars())

    def on_train_end(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        """End the run in the history."""
        if self.monitor is not None:
            self.monitor.close()


def attach(trainer: Trainer, probe: Probe, **options: Any) -> PeelwiseCallback:
    """Watch what ``trainer`` trains; call it before ``trainer.train()``.

    Args:
        trainer: of transformers, or a subclass (such as TRL's).
        probe: text or batches to measure on; see `Probe`.
        options: of `Monitor`: ``budget``, ``store`` and so on.

    Returns:
        The callback, whose ``monitor`` exists while it trains.

    Raises:
        OptionError: If a monitor is attached already.
        UnsupportedModelError: If the model cannot be measured.
        ProbeError: If the probe does not fit it.

    Example:
        >>> peelwise.attach(trainer, probe, budget=0.03, store="run.db")
        >>> trainer.train()
    """
    callbacks = trainer.callback_handler.callbacks
    if any(isinstance(callback, PeelwiseCallback) for callback in callbacks):
        raise OptionError("A monitor is attached to this trainer already; one is enough.")
    checked_blocks(trainer.model, probe, batches=True, stack=options.get("stack"), spread=True)
    callback = PeelwiseCallback(probe, **options)
    callbacks.insert(0, callback)
    step = trainer.training_step

    def training_step(*args: Any, **options: Any) -> Any:
        loss = step(*args, **options)
        callback.keep(loss)
        return loss

    trainer.training_step = training_step
    return callback
