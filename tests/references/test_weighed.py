"""Descent weighed on both sides, against the objective written out and against codes moved one at a time."""

from __future__ import annotations

import pytest
import torch

from peelwise.formats.membership import check_member, scaled_part
from peelwise.formats.table import parse_format
from peelwise.references.descent import Descent
from peelwise.references.weighed import weighed_descent
from planted import normal


def problem(d_out, d_in, *, seed=0):
    """Return ``M``, ``S`` and ``T``, both metrics with correlations as those of real layers have."""

    def metric(size, own):
        drawn = normal(4 * size, size, seed=own).float() @ (
            torch.eye(size) + 0.3 * normal(size, size, seed=own).float()
        )
        return drawn.T @ drawn / (4 * size)

    return metric(d_out, seed + 1), metric(d_in, seed + 2), normal(d_out, d_in, seed=seed).float()


def objective(M, S, T, form, encoded):
    E = (form.decode(encoded) - T).double()
    return float((E * (M.double() @ E @ S.double())).sum())


def one_at_a_time(M, S, T, form, start):
    """Move every code once to its best level, row by row, each knowing all before it."""
    codes, scales = start.codes.double(), form.layout.spread(start.scales.double(), *T.shape)
    M, S, T = M.double(), S.double(), T.double()
    for i in range(T.shape[0]):
        for j in range(T.shape[1]):
            gradient = (M[i] @ (codes * scales - T) @ S[:, j]) / (M[i, i] * S[j, j])
            codes[i, j] = form.levels.nearest(codes[i, j] - gradient / scales[i, j])
    E = codes * scales - T
    return float((E * (M @ E @ S)).sum())


@pytest.mark.parametrize("shape", [(64, 128), (70, 96), (20, 40)])
@pytest.mark.parametrize("name", ["int3:group=8", "ternary:channel", "int4:group=8,affine", "nf4:group=8"])
def test_it_is_never_worse_and_far_better_than_descent_that_knows_one_side(shape, name):
    M, S, T = problem(*shape)
    form = scaled_part(parse_format(name))
    descent = Descent(S, T, form, form.encode(T))
    descent.feed_back()
    descent.sweep()
    start = descent.encoded()
    found = weighed_descent(M, S, T, form, start, max_sweeps=3, tolerance=0.0)
    check_member(found, form, shape)
    assert torch.equal(found.scales, start.scales)
    assert objective(M, S, T, form, found) < 0.9 * objective(M, S, T, form, start)


@pytest.mark.parametrize("shape", [(24, 32), (70, 40)])
def test_sweeps_are_about_as_good_as_codes_moved_one_at_a_time(shape):
    M, S, T = problem(*shape, seed=5)
    form = parse_format("int3:group=8")
    start = form.encode(T)
    found = objective(M, S, T, form, weighed_descent(M, S, T, form, start, max_sweeps=2, tolerance=0.0))
    wanted, before = one_at_a_time(M, S, T, form, start), objective(M, S, T, form, start)
    assert before - found > 0.9 * (before - wanted)


def test_structural_zeros_and_layers_without_a_scale_stay():
    M, S, T = problem(16, 32)
    T[3] = 0
    form = parse_format("int4:channel,keep=2:4")
    start = form.encode(T)
    assert float(start.scales[3]) == 0
    found = weighed_descent(M, S, T, scaled_part(form), start, max_sweeps=2, tolerance=0.0)
    assert torch.equal(found.support, start.support)
    assert objective(M, S, T, form, found) < objective(M, S, T, form, start)
    check_member(found, form, (16, 32))


def test_what_is_best_already_stays():
    M, S, T = problem(16, 32)
    form = parse_format("int8:channel")
    start = form.encode(T)
    at = form.decode(start)
    assert weighed_descent(M, S, at, form, start, max_sweeps=2, tolerance=0.0) is start
    assert weighed_descent(M, S, T, form, start, max_sweeps=0, tolerance=0.0) is start
