"""Sums that fade: a mean over all rows, each by its age, and only of what is kept."""

from __future__ import annotations

import torch

from peelwise.engine import fading
from peelwise.engine.fading import FadingSums, HalfLives
from peelwise.model.architectures import find_blocks
from peelwise.stats.gram import Moments
from zoo import ZOO


def layers():
    return find_blocks(ZOO["plain"]())[0].linears[:2]


def moments(seed, n, S=None):
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    g = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return Moments(n, own.T @ own / n if S is None else S, g.T @ own / n, g.T @ g / n)


def test_rows_count_by_their_age():
    (layer, _), kept = layers(), FadingSums(HalfLives(S=50, F=50))
    steps, found = [10, 60, 160], [moments(k, n) for k, n in enumerate((40, 60, 30))]
    for step, own in zip(steps, found, strict=True):
        kept.begin(step)
        joined = kept.joined({layer: own})[layer]
    ages = torch.tensor([0.25 * 0.5, 0.25, 1.0], dtype=torch.float64)  # 100 and 50 steps behind half-lives of 50
    weights = ages * torch.tensor([40.0, 60.0, 30.0], dtype=torch.float64)
    expected = sum(w * m.S for w, m in zip(weights, found, strict=True)) / weights.sum()
    assert torch.allclose(joined.S.double(), expected, atol=1e-6)
    assert joined.n == round(float(weights.sum()))
    assert torch.equal(joined.C, found[-1].C)  # the gradient is of the model as it is
    assert not torch.allclose(joined.F.double(), found[-1].F)


def test_a_long_run_keeps_for_longer():
    (layer, _), kept = layers(), FadingSums(HalfLives(S=50))
    for step in (4_000, 5_000):
        kept.begin(step)
        joined = kept.joined({layer: moments(step, 100)})[layer]
    assert joined.n == round(100 + 100 * 0.5 ** (1_000 / 1_250))


def test_layers_that_share_their_inputs_share_the_sum():
    (one, other), kept = layers(), FadingSums()
    for step in (1, 2):
        kept.begin(step)
        own = moments(step, 20)
        joined = kept.joined({one: own, other: moments(7, 20, S=own.S)})
        assert joined[one].S is joined[other].S


def test_going_back_forgets():
    (layer, _), kept = layers(), FadingSums()
    own = moments(3, 20)
    for step in (100, 50):
        kept.begin(step)
        kept.joined({layer: moments(step, 20)} if step == 100 else {})
    kept.begin(60)
    assert torch.equal(kept.joined({layer: own})[layer].S, own.S)


def test_sums_that_would_take_too_much_are_not_kept(monkeypatch):
    blocks = find_blocks(ZOO["plain"]())
    kept = FadingSums.affordable(blocks)
    assert kept is not None
    monkeypatch.setattr(fading, "_MOST_BYTES", 1_000)
    assert FadingSums.affordable(blocks) is None
