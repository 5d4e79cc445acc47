from __future__ import annotations

import pytest
import torch

from peelwise.formats.signals import measure
from peelwise.formats.table import parse_format


def test_signals_of_a_matrix_that_can_be_counted_by_hand() -> None:
    form = parse_format("ternary:channel")
    latent = torch.tensor([[1.0, -1.0, 0.48, 0.2], [0.0, 0.0, 0.0, 0.0], [2.0, 1.04, -0.9, 0.0]])
    before = form.quantized(latent, torch.ones(3, 1), None)
    first = measure(form, latent, before)
    assert first.flipped is None
    assert first.scale_drift is None
    assert first.dead_rows == 1
    assert first.near_threshold == pytest.approx(1 / 12)  # 0.48 is 0.02 from 0.5; beyond 1 there is no threshold
    moved = latent.clone()
    moved[0, 2] = 0.52
    moved[2, 2] = -0.1
    second = measure(form, moved, form.quantized(moved, torch.tensor([[1.0], [1.0], [1.1]]), None), before)
    assert second.flipped == pytest.approx(2 / 12)
    assert second.scale_drift == pytest.approx(0.1 / 3, rel=1e-3)


def test_thresholds_are_halfway_between_levels_in_every_family() -> None:
    for name, latent, near in (
        ("binary", [[0.04, -0.04, 0.3, -1.2]], 2),  # 0.04 is 0.02 of the distance between -1 and 1
        ("int2", [[-1.5, -1.0, 0.5, 3.0]], 2),
        ("int4:affine", [[-3.49, 0.0, 4.5, 15.0]], 2),
        ("int4:minimum", [[0.5, 1.0, 14.5, 15.0]], 2),
    ):
        form, W = parse_format(name), torch.tensor(latent)
        zeros = {"int4:affine": torch.full((1, 1), 5, dtype=torch.uint8), "int4:minimum": torch.zeros(1, 1)}.get(name)
        encoded = form.quantized(W, torch.ones(1, 1), zeros)
        assert measure(form, W, encoded).near_threshold == near / 4, name


def test_structural_zeros_are_not_counted() -> None:
    form = parse_format("ternary:channel,blocks=2")
    W = torch.full((4, 4), 0.5)
    encoded = form.encode(W)
    assert measure(form, W, encoded).near_threshold == 0.0
    half = form.inner.quantized(W, torch.ones(4, 1), None, encoded.support)
    assert measure(form, W, half).near_threshold == 1.0
    assert measure(form, W, half, half).flipped == 0.0
