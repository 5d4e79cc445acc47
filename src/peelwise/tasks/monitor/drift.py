"""How far the weights of a run have turned and whether they keep their direction: signals that need their history.

A sample of every layer's weights is kept as it was when monitoring began and at the last two measurements: two million
numbers of each time at most, in main memory, some 16,000 of a layer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peelwise.distributed.sharding import is_sharded
from peelwise.engine.signals import of_block, of_layer
from peelwise.model.layers import Block, LinearLayer
from peelwise.records.run import Measurement
from peelwise.records.signals import Kind
from peelwise.tasks.monitor.own import OwnHistory

_log = logging.getLogger("peelwise")

_KINDS: tuple[Kind, ...] = ("drift",)
_SAMPLED, _FEWEST, _IN_ALL = 16_384, 64, 2**21  # numbers of a layer at most and at least, and of all


@dataclass(frozen=True, eq=False)
class Moved:
    """A sample of one layer's weights ``[n]``: as they are, at the last two measurements, and at the start."""

    now: Tensor
    before: Tensor | None
    earlier: Tensor | None
    start: Tensor


class Drift:
    """Follows the weights of a run; nothing of the model is changed or run.

    Args:
        blocks: of the model, at the moment that counts as the start.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._start = _samples(blocks)
        self._before: dict[str, Tensor] = dict(self._start)
        self._earlier: dict[str, Tensor] = {}
        self._history = OwnHistory()

    def noted(self, row: Measurement, blocks: Sequence[Block]) -> Measurement:
        """Return the row of a measurement with the signals of every block whose weights this process has whole."""
        try:
            found = self._measured(blocks)
        except Exception as error:  # such as layers that hold no number: the training must not end of it
            _log.debug("drift at step %d", row.step, exc_info=error)
            return row
        return replace(row, statistics=(*row.statistics, *self._history.rows(row.step, found)))

    def _measured(self, blocks: Sequence[Block]) -> dict[int, dict[str, float]]:
        now = _samples(blocks)
        found = {}
        for block in blocks:
            layers = [
                of_layer(_KINDS, Moved(now[name], self._before.get(name), self._earlier.get(name), self._start[name]))
                for name in (linear.name for linear in block.linears)
                if name in now and name in self._start and len(now[name]) == len(self._start[name])
            ]
            found[block.index] = of_block(_KINDS, layers)
        self._earlier, self._before = self._before, now
        return found


def rotation(of: Moved) -> float | None:
    """Return ``1 - cos(w, w_0)`` of the weights and those of the start, from 0 to 2 (layer rotation,
    arXiv:1806.01603)."""
    cosine = _cosine(of.now, of.start)
    return None if cosine is None else 1 - cosine


def progress(of: Moved) -> float | None:
    """Return ``cos(w - w', w' - w'')`` of the last two displacements, ``w'`` and ``w''`` at the measurements before."""
    if of.before is None or of.earlier is None:
        return None
    return _cosine(of.now - of.before, of.before - of.earlier)


def _cosine(a: Tensor, b: Tensor) -> float | None:
    a, b = a.double(), b.double()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if 0 < size < float("inf") else None


@torch.no_grad()
def _samples(blocks: Sequence[Block]) -> dict[str, Tensor]:
    """Return evenly spaced weights of every layer by its name, float32 in main memory; not of sharded ones."""
    linears = [linear for block in blocks for linear in block.linears]
    # A mixture has tens of thousands of layers.
    most = min(_SAMPLED, max(_FEWEST, _IN_ALL // max(len(linears), 1)))
    samples = ((linear.name, _sample(linear, most)) for linear in linears)
    return {name: sample for name, sample in samples if sample is not None}


def _sample(linear: LinearLayer, most: int) -> Tensor | None:
    W = linear.weight()
    if is_sharded(W) or W.is_meta:
        return None
    flat = W.reshape(-1)
    return flat[:: -(-flat.numel() // most)].to("cpu", torch.float32, copy=True)
