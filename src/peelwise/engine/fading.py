"""Sums of earlier measurements that fade: how a monitor's fit tokens accumulate while the model moves on.

For the mean ``A_k`` of measurement ``k`` over ``n_k`` rows, at step ``s_k``, with half-life ``h`` in steps, and no less
than a quarter of those so far, because a young model changes faster:

    w_k = n_k + 2^(-(s_k - s_(k-1)) / h) w_(k-1)        K_k = K_(k-1) + (A_k - K_(k-1)) n_k / w_k

so ``K_k`` is a mean over all rows so far, each weighed by its age. Which of the sums may be kept is a matter of how
fast they become wrong: the inputs' second moments ``S`` and those of the outputs' gradients ``F`` change slowly; the
mean gradient ``C`` is what training itself follows, and an old one points to where the model has been. What helps is
measured in benchmarks/rolling_sums.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from peelwise.model.layers import Block, LinearLayer
from peelwise.stats.gram import Moments


@dataclass(frozen=True)
class HalfLives:
    """In steps of training, after which a row of ``S``, ``C`` or ``F`` counts half; 0 keeps nothing."""

    S: float = 0.0
    C: float = 0.0
    F: float = 0.0


@dataclass(frozen=True)
class _Kept:
    weight: float  # rows, each by its age
    mean: Tensor


# What benchmarks/rolling_sums.py found best.
KEPT = HalfLives(S=100.0, F=100.0)
_MOST_BYTES = 2**30
_SHARE = 0.25


class FadingSums:
    """Keeps the sums of one training run, by layer.

    Args:
        half_lives: of each of the three sums.
        share: of the steps so far that a half-life is at least.
    """

    def __init__(self, half_lives: HalfLives = KEPT, *, share: float = _SHARE) -> None:
        self._half_lives, self._share = half_lives, share
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._step: int | None = None
        self._before: int | None = None

    @classmethod
    def affordable(cls, blocks: Sequence[Block]) -> FadingSums | None:
        """Return what keeps sums of all layers of some blocks; ``None`` if they would take more than 1 GiB."""
        sides = [side for block in blocks for linear in block.linears for side in linear.weight().shape]
        return cls() if 4 * sum((side + 1) ** 2 for side in sides) <= _MOST_BYTES else None

    @property
    def bytes(self) -> int:
        """What is kept at present."""
        return sum(kept.mean.numel() * kept.mean.element_size() for kept in self._kept.values())

    def begin(self, step: int) -> None:
        """Note that a measurement begins; where training went back, what was kept is of another future."""
        if self._step is not None and step < self._step:
            self._kept.clear()
        self._before, self._step = self._step, step

    def joined(self, fit: Mapping[LinearLayer, Moments]) -> dict[LinearLayer, Moments]:
        """Return moments with those kept before, and keep them; layers that share ``S`` still share it.

        Experts are left as they are: which tokens they see is another choice at every step.

        Args:
            fit: of the measurement that has begun, per layer ``S [d_in, d_in]``, ``C [d_out, d_in]``,
                ``F [d_out, d_out]``.
        """
        shared: dict[int, tuple[Tensor, float]] = {}
        out = {}
        for linear, own in fit.items():
            if linear.is_expert:
                out[linear] = own
                continue
            if id(own.S) not in shared:
                shared[id(own.S)] = self._join(linear.name, "S", own.S, own.n, self._half_lives.S)
            S, rows = shared[id(own.S)]
            C, _ = self._join(linear.name, "C", own.C, own.n, self._half_lives.C)
            F = None if own.F is None else self._join(linear.name, "F", own.F, own.n, self._half_lives.F)[0]
            out[linear] = replace(own, n=round(rows), S=S, C=C, F=F)
        return out

    def _join(self, name: str, which: str, mean: Tensor, rows: int, half_life: float) -> tuple[Tensor, float]:
        """Return the mean and the rows it stands for, with what was kept, and keep it."""
        if half_life <= 0:
            return mean, float(rows)
        kept = self._kept.get((name, which))
        weight, joined = float(rows), mean
        if kept is not None and kept.mean.shape == mean.shape and kept.mean.device == mean.device:
            assert self._step is not None
            age = self._step - (self._step if self._before is None else self._before)
            weight = rows + 0.5 ** (age / max(half_life, self._share * self._step)) * kept.weight
            joined = kept.mean.to(mean).lerp(mean, rows / weight)
        self._kept[name, which] = _Kept(weight, joined.float())
        return joined, weight
