"""The samples of a YES bound: checked once, split, and handed out in batches without a copy of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd, isclose
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from peelwise.errors import OptionError, ProbeError, TooFewSamplesError
from peelwise.tasks.yes.chain import Chain

LossName = Literal["squared", "cross_entropy"]
FIT, SELECT, REPORT = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs ``x [n, d_0]`` with targets ``y``: ``[n, m]``, or class labels ``[n]`` for cross-entropy."""

    x: Tensor
    y: Tensor
    loss: LossName
    classes: int
    split: tuple[float, float, float]
    seed: int
    batch_size: int
    device: torch.device
    permuted: bool = False

    def __len__(self) -> int:
        return self.x.shape[0]

    def with_permuted_targets(self) -> Samples:
        """Return the same samples, targets of the fit and select parts permuted over all samples."""
        return replace(self, permuted=True)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield ``(x, y, part)`` with ``part [b]`` in ``FIT, SELECT, REPORT``; floats in float64."""
        for start in range(0, len(self), self.batch_size):
            index = torch.arange(start, min(start + self.batch_size, len(self)))
            part = self._parts(index)
            x, y = self.x[index[0] : index[-1] + 1], self.y[index[0] : index[-1] + 1]
            if self.permuted:
                other = self.y[self._elsewhere(index).to(self.y.device)]
                training = (part != REPORT).to(y.device)
                y = torch.where(training if y.dim() == 1 else training[:, None], other, y)
            y = y.to(self.device) if self.loss == "cross_entropy" else y.to(self.device).double()
            yield x.to(self.device).double().flatten(1), y, part.to(self.device)

    def regression_targets(self, y: Tensor) -> Tensor:
        """Return ``y`` as numbers to regress to ``[b, m]``: class labels become one-hot rows."""
        return functional.one_hot(y, self.classes).double() if self.loss == "cross_entropy" else y

    def per_sample_loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each sample ``[b]``: squared error summed over outputs, or nats."""
        if self.loss == "cross_entropy":
            return functional.cross_entropy(output, y, reduction="none")
        return (output - y).square().sum(dim=1)

    def counts(self) -> tuple[int, int, int]:
        """Return the numbers of fit, select and report samples."""
        total = torch.zeros(3, dtype=torch.int64)
        for start in range(0, len(self), 65536):
            index = torch.arange(start, min(start + 65536, len(self)))
            total += torch.bincount(self._parts(index), minlength=3)
        return int(total[0]), int(total[1]), int(total[2])

    def _parts(self, index: Tensor) -> Tensor:
        """Return the part of each sample, a hash of seed and index: no permutation is ever stored."""
        z = index * 0x1E3779B97F4A7C15 + self.seed * 0x2545F4914F6CDD1D  # wraps around, as hashes do
        for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
            z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
        uniform = ((z >> 11) & ((1 << 53) - 1)).double() / 2.0**53
        return (uniform >= self.split[0]).long() + (uniform >= self.split[0] + self.split[1]).long()

    def _elsewhere(self, index: Tensor) -> Tensor:
        """Return a permutation of the samples at ``index``: affine modulo ``n``, so nothing is stored."""
        n = len(self)
        stride = max(1, int(n * 0.6180339887))
        while gcd(stride, n) != 1:
            stride += 1
        return (index * stride + (1 + self.seed) * max(1, n // 3)) % n


def checked_samples(
    chain: Chain,
    x: Tensor,
    y: Tensor,
    *,
    loss: str,
    split: Sequence[float] | None,
    seed: int,
    batch_size: int,
) -> Samples:
    """Return the samples, or say in one error what is wrong with them.

    Raises:
        OptionError: If ``loss``, ``split`` or ``batch_size`` has a value that is not allowed.
        ProbeError: If ``x`` or ``y`` has a wrong shape or type, or holds values that are not finite.
        TooFewSamplesError: If a part of the split is empty.
    """
    if loss not in ("squared", "cross_entropy"):
        raise OptionError(f'loss: expected "squared" or "cross_entropy", got {loss!r}.')
    if batch_size < 1:
        raise OptionError(f"batch_size: expected at least 1 sample, got {batch_size}.")
    parts = (1.0, 0.0, 0.0) if split is None else tuple(float(s) for s in split)
    if len(parts) != 3 or min(parts) < 0 or not isclose(sum(parts), 1.0, abs_tol=1e-6):
        raise OptionError(f"split: expected three shares (fit, select, report) that add up to 1, got {split}.")
    _check_inputs(chain, x)
    classes = chain.widths[-1]
    if loss == "cross_entropy":
        _check_labels(y, x.shape[0], classes)
    else:
        _check_targets(y, x.shape[0], classes)
    kind: LossName = "squared" if loss == "squared" else "cross_entropy"
    samples = Samples(x.detach(), y.detach(), kind, classes, parts, seed, batch_size, chain.device)
    for share, count, name in zip(parts, samples.counts(), ("fit", "select", "report"), strict=True):
        if share > 0 and count < 2:
            raise TooFewSamplesError(
                f"x: the {name} part got {count} of {len(samples)} samples and needs 2. Give more samples or "
                f"change split={parts}."
            )
    return samples


def _check_inputs(chain: Chain, x: object) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
        raise ProbeError(f"x: expected a float tensor, samples as rows, got {_seen(x)}.")
    width = x[0].numel() if x.shape[0] else 0
    if x.shape[0] == 0 or width != chain.width_in:
        raise ProbeError(f"x: expected [n, {chain.width_in}] to fit the first layer, got {_seen(x)}.")
    _check_finite("x", x)


def _check_targets(y: object, n: int, width: int) -> None:
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise ProbeError(
            f"y: squared error needs a float tensor [{n}, {width}], got {_seen(y)}. For class labels use "
            'loss="cross_entropy".'
        )
    if tuple(y.shape) != (n, width):
        raise ProbeError(
            f"y: expected [{n}, {width}], one row per sample of x and one column per output, got {_seen(y)}."
        )
    _check_finite("y", y)


def _check_labels(y: object, n: int, classes: int) -> None:
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or tuple(y.shape) != (n,):
        raise ProbeError(
            f"y: cross-entropy needs class labels, an int64 tensor [{n}], got {_seen(y)}. Use y.long(), or "
            'loss="squared" for real targets.'
        )
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise ProbeError(
            f"y: labels must be 0..{classes - 1} for {classes} outputs, got {int(y.min())}..{int(y.max())}."
        )


def _check_finite(name: str, values: Tensor) -> None:
    for start in range(0, values.shape[0], 65536):  # in pieces: a mask of everything would grow with n
        good = torch.isfinite(values[start : start + 65536])
        if not bool(good.all()):
            row = start + int((~good).flatten(1).any(1).nonzero()[0])
            raise ProbeError(f"{name}: NaN or Inf, first in row {row}. Remove or repair these samples.")


def _seen(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}".removeprefix("torch.")
    return type(value).__name__
