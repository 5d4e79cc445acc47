"""Better codes for a label-driven step, against slow and obvious computations."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from peelwise.formats.membership import check_member
from peelwise.formats.table import parse_format
from peelwise.references.coded import (
    LocalProblem,
    Metric,
    flip_steps,
    flipped,
    local_split,
    next_level,
    projected,
    step_for_share,
)

NAMES = ["binary:channel", "ternary", "int3:group=4", "int2:affine", "int3:minimum,band=3", "ternary:keep=2:4"]


def _spd(d: int, seed: int) -> Tensor:
    x = torch.randn(3 * d, d, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / len(x) + 0.1 * torch.eye(d)


def _problem(name: str, seed: int = 0, d_out: int = 6, d_in: int = 8):
    torch.manual_seed(seed)
    form = parse_format(name)
    encoded = form.encode(torch.randn(d_out, d_in))
    return form, encoded, Metric(_spd(d_in, seed), _spd(d_out, seed + 1)), 0.8 * torch.randn(d_out, d_in)


def _distance(metric: Metric, E: Tensor) -> float:
    return (
        float((metric.times(E.double()) * E.double()).sum())
        if metric.S.dtype == torch.float64
        else float((metric.times(E) * E).sum())
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_code_moves_by_exactly_one_level_or_not_at_all(name: str) -> None:
    form, encoded, _, towards = _problem(name)
    change = next_level(form, encoded, towards)
    assert bool(((change == 0) | (change.sign() == towards.sign())).all())
    W, levels = form.decode(encoded), (form.inner if hasattr(form, "inner") else form).levels
    scales = encoded.scales.float().abs()
    for i, j in itertools.product(*map(range, change.shape)):
        code = int(encoded.codes[i, j])
        wanted = [
            form.decode(type(encoded)(_with(encoded.codes, i, j, c), encoded.scales, encoded.zeros, encoded.support))[
                i, j
            ]
            for c in (code - levels.step, code + levels.step)
            if levels.low <= c <= levels.high
        ]
        moves = [float(w - W[i, j]) for w in wanted if float(w - W[i, j]) * float(towards[i, j]) > 0]
        expected = moves[0] if moves else 0.0
        assert float(change[i, j]) == pytest.approx(expected, abs=1e-6 * float(scales.max()))


def _with(codes: Tensor, i: int, j: int, value: int) -> Tensor:
    codes = codes.clone()
    codes[i, j] = value
    return codes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_flips_come_nearer_in_the_metric_and_stay_in_the_format(name: str, seed: int) -> None:
    form, encoded, metric, D = _problem(name, seed)
    W = form.decode(encoded)
    distances = [_distance(metric, D)]
    for rounds in (1, 3, 60):
        best = flipped(metric, D, form, encoded, rounds=rounds)
        check_member(best, form, (6, 8))
        distances.append(_distance(metric, W + D - form.decode(best)))
    assert distances[0] >= distances[1] - 1e-5 >= distances[2] - 2e-5 >= distances[3] - 3e-5
    assert distances[-1] < distances[0]
    # Where it ends no single flip helps any more.
    gap = W + D - form.decode(best)
    for towards in (torch.ones(6, 8), -torch.ones(6, 8)):
        change = next_level(form, best, towards)
        for i, j in change.nonzero().tolist():
            other = gap.clone()
            other[i, j] -= change[i, j]
            assert _distance(metric, other) > distances[-1] - 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_projections_are_never_worse_than_the_codes_in_use(name: str) -> None:
    form, encoded, metric, D = _problem(name)
    W = form.decode(encoded)
    for size in (0.0, 0.01, 1.0, 10.0):
        best = projected(metric.S, W + size * D, form, encoded)
        check_member(best, form, (6, 8))
        gaps = [W + size * D - form.decode(e) for e in (encoded, best)]
        before, after = (_distance(Metric(metric.S), gap) for gap in gaps)
        assert after <= before + 1e-5
        if size == 0.0:
            assert best is encoded


@pytest.mark.parametrize("name", ["ternary", "int3:group=4"])
def test_the_share_asked_for_is_about_the_share_that_flips_first(name: str) -> None:
    form, encoded, metric, D = _problem(name, d_out=40, d_in=64)
    steps = [flip_steps(metric, D, form, encoded)]
    for share in (0.02, 0.1):
        a = step_for_share(steps, share)
        change = next_level(form, encoded, metric.times(D))
        gain = (-a * metric.times(D) + 0.5 * metric.diagonal() * change) * change
        assert float((gain < 0).sum()) / max(float((change != 0).sum()), 1) == pytest.approx(share, abs=0.005)
    assert step_for_share([], 0.1) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_of_a_layer_add_up_to_its_present_error(name: str) -> None:
    form, encoded, metric, D = _problem(name)
    problem = LocalProblem(metric.S, metric.M, 0.1, 0.1)
    split = local_split(problem, D, form, encoded)
    now = sum(0.5 * float(metric.M[i, i]) * float(D[i] @ metric.S @ D[i]) for i in range(6))
    assert split.price_of_precision + split.left_on_the_table == pytest.approx(now, rel=1e-5)
    assert split.price_of_precision > 0  # the target is in no format


@pytest.mark.parametrize("name", NAMES)
def test_a_target_inside_the_format_costs_nothing_but_the_codes_that_are_not_used(name: str) -> None:
    form, encoded, metric, _ = _problem(name)
    levels = (form.inner if hasattr(form, "inner") else form).levels
    better = encoded.codes.clone()
    better[better == levels.low] += levels.step
    D = form.decode(replace(encoded, codes=better)) - form.decode(encoded)
    split = local_split(LocalProblem(metric.S, metric.M, 0.1, 0.1), D, form, encoded)
    now = sum(0.5 * float(metric.M[i, i]) * float(D[i] @ metric.S @ D[i]) for i in range(6))
    assert now > 0.01
    assert split.left_on_the_table == pytest.approx(now, rel=1e-5)
    assert split.price_of_precision == pytest.approx(0, abs=1e-5 * now)
