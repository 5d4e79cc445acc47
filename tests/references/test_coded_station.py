"""Codes near a least-squares solution: the bias is eliminated exactly, and what the sums promise the rows keep."""

from __future__ import annotations

import pytest
import torch

from peelwise.formats.membership import check_member, same_support
from peelwise.formats.table import parse_format
from peelwise.references.coded_station import coded_changes, without_bias
from peelwise.references.station import best_change

from .test_station import planted, sums_of

WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)


def test_the_bias_that_is_left_out_is_the_best_one():
    """Whatever the codes, the objective with the best bias is the objective in the metric without it."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=draw, dtype=torch.float64)
    x[:, -1] = 1.0
    S, T, W = x.T @ x / 40, *(torch.randn(3, n, generator=draw, dtype=torch.float64) for n in (6, 5))
    metric, column = without_bias(S, 5)
    gap = W - T[:, :5]
    bias = T[:, 5] - gap @ column

    def whole(b):
        full = torch.cat([gap, (b - T[:, 5])[:, None]], dim=1)
        return float(((full @ S) * full).sum())

    assert whole(bias) == pytest.approx(float(((gap @ metric) * gap).sum()), rel=1e-12)
    for by in (-1e-3, 1e-3):
        assert whole(bias + by) > whole(bias)
    assert without_bias(S, 6) == (S, None)


@pytest.mark.parametrize(
    "name", ["ternary", "binary", "int3:group=2,affine", "int4:minimum", "binary:model", "ternary:keep=1:2"]
)
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_promised_of_select_is_what_its_rows_say(name, bias):
    form = parse_format(name)
    d_in = 6
    fit, select = planted(seed=0), planted(seed=1)
    fit, select = ((x[:, : d_in + bias], r) for x, r in (fit, select))
    if bias:
        for x, _ in (fit, select):
            x[:, -1] = 1.0
    start = form.encode(torch.randn(4, d_in, generator=torch.Generator().manual_seed(5)))
    W = torch.nn.functional.pad(form.decode(start).double(), (0, int(bias)))
    (x, y), (x_select, y_select) = fit, select
    sums = sums_of(x, y - x @ W.T), sums_of(x_select, y_select - x_select @ W.T)
    found = best_change(*sums, WEIGHTS)
    candidates = coded_changes(sums[0].S, found, form, start, sums[1], WEIGHTS)
    assert candidates
    decreases = [candidate.decrease for candidate in candidates]
    assert decreases == sorted(decreases, reverse=True)
    assert decreases[-1] > 0
    before = ((y_select - x_select @ W.T).square() @ WEIGHTS).mean()
    for candidate in candidates:
        check_member(candidate.encoded, form, (4, d_in))
        assert same_support(candidate.encoded.support, start.support)
        if name == "binary:model":
            assert torch.equal(candidate.encoded.scales, start.scales)
        moved = W[:, :d_in].float() + candidate.change[:, :d_in]
        torch.testing.assert_close(moved, form.decode(candidate.encoded))
        after = ((y_select - x_select @ (W + candidate.change.double()).T).square() @ WEIGHTS).mean()
        assert float(before - after) == pytest.approx(candidate.decrease, rel=1e-4, abs=1e-6)


def test_nothing_to_gain_gives_no_codes():
    """Control: the map in use already is the truth."""
    form = parse_format("int8")
    start = form.encode(torch.randn(4, 7, generator=torch.Generator().manual_seed(5)))
    x, _ = planted(seed=0)
    noise = 0.1 * torch.randn(200, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    x_select, _ = planted(seed=1)
    none = torch.zeros(200, 4, dtype=torch.float64)
    found = best_change(sums_of(x, noise), sums_of(x_select, none), WEIGHTS)
    assert coded_changes(sums_of(x, noise).S, found, form, start, sums_of(x_select, none), WEIGHTS) == []
