"""Signs of life of a low-bit layer in training, from its latent weights and codes alone.

A gradient step moves the latent weight a little; the layer computes something else only once the weight has crossed the
threshold between two codes. Few crossings are normal late in training, and the first thing to look at when a run seems
stuck.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peelwise.formats.base import Encoded, Format
from peelwise.formats.masked import Masked
from peelwise.formats.scaled import Scaled

NEAR = 0.05  # of the distance between two levels


@dataclass(frozen=True)
class LowBitSignals:
    """What is seen of one layer in one measurement; shares are of its weights, structural zeros left out.

    Attributes:
        flipped: share of codes that differ from the measurement before; ``None`` at the first measurement.
        near_threshold: share of latent weights within `NEAR` level distances of a threshold between two codes: those
            that a small step can flip.
        scale_drift: mean of ``|s - s_before| / |s_before|`` over scales; ``None`` at the first measurement.
        dead_rows: outputs all of whose weights are zero.
    """

    flipped: float | None
    near_threshold: float
    scale_drift: float | None
    dead_rows: int


def measure(form: Format, latent: Tensor, now: Encoded, before: Encoded | None = None) -> LowBitSignals:
    """Return the signals of one layer.

    Args:
        form: its format.
        latent: its latent weight ``[d_out, d_in]``.
        now: its codes.
        before: its codes at the measurement before, of the same format.
    """
    on = torch.ones_like(now.codes, dtype=torch.bool) if now.support is None else now.support
    weights = float(on.sum())
    flipped = drift = None
    if before is not None:
        flipped = float(((now.codes != before.codes) & on).sum()) / weights
        drift = _drift(now.scales, before.scales)
    near = float((_distance(form, latent, now) < NEAR).logical_and(on).sum()) / weights
    dead = int((form.decode(now) == 0).all(1).sum())
    return LowBitSignals(flipped, near, drift, dead)


def _drift(now: Tensor | None, before: Tensor | None) -> float:
    if now is None or before is None:
        return 0.0
    new, old = now.double(), before.double().to(now.device)
    alive = old != 0
    return float(((new - old).abs() / old.abs())[alive].mean()) if bool(alive.any()) else 0.0


def _distance(form: Format, latent: Tensor, now: Encoded) -> Tensor:
    """Return how far each latent weight is from the nearest threshold, in distances between levels."""
    inner = form.inner if isinstance(form, Masked) else form
    assert isinstance(inner, Scaled)
    levels = inner.levels
    x = levels.position(inner.in_codes(latent, now))  # codes are at 0, 1 .. count - 1
    threshold = (x - 0.5).round().clamp(0, levels.count - 2) + 0.5
    return (x - threshold).abs()
