from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from peelwise.errors import FormatError
from peelwise.formats.base import Encoded
from peelwise.formats.masked import BlockDiagonal, Given, Masked
from peelwise.formats.scaled import Scaled
from peelwise.formats.table import parse_format
from peelwise.references.descent import Descent
from peelwise.references.quantized import lowest_on_support, quadratic, solve, solve_together, split

SCALED = [
    *("binary", "binary:tensor", "binary:group=7", "ternary", "ternary:channel", "int2", "int3:group=7", "int4:tensor"),
    *("int4:affine", "int4:group=7,affine", "int4:minimum", "int3:group=7,minimum,scale=bfloat16", "int8"),
    *("binary:model", "ternary:blocks=2", "int4:affine,band=9", "int3:group=14,minimum,keep=1:2"),
]


def _problem(d_out: int = 6, d_in: int = 70, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A target and correlated inputs, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d_in, d_in, generator=generator, dtype=torch.float64)
    x = torch.randn(3 * d_in, d_in, generator=generator, dtype=torch.float64) @ (mixing / d_in**0.5)
    T = 0.1 * torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    return x.T @ x / len(x), T


def _error(S: Tensor, W: Tensor, T: Tensor) -> float:
    return float(torch.trace((W - T) @ S @ (W - T).T))


def _exhaustive(S: Tensor, T: Tensor, levels: list[int], *, rows_apart: bool) -> float:
    """The lowest ``q`` over every choice of codes, each with its best scale that is not negative."""
    total = 0.0
    for part in T.split(1 if rows_apart else len(T)):
        codes = torch.tensor(list(itertools.product(levels, repeat=part.numel())), dtype=torch.float64)
        codes = codes.view(-1, *part.shape)  # [choices, rows, d_in]
        slope = (codes * (part @ S)).sum((1, 2)).clamp_min(0)
        curvature = ((codes @ S) * codes).sum((1, 2))
        scale = torch.where(curvature > 0, slope / curvature, 0.0)
        differences = scale[:, None, None] * codes - part
        total += float(((differences @ S) * differences).sum((1, 2)).min())
    return total


@pytest.mark.parametrize(
    ("name", "levels", "rows_apart"),
    [
        ("binary:scale=float32", [-1, 1], True),
        ("binary:tensor,scale=float32", [-1, 1], False),
        ("ternary:channel,scale=float32", [-1, 0, 1], True),
        ("int2:scale=float32", [-2, -1, 0, 1], True),
    ],
)
@pytest.mark.slow
def test_exhaustive_search_finds_nothing_better_and_rarely_much_better(
    name: str, levels: list[int], rows_apart: bool
) -> None:
    form = parse_format(name)
    excess, rounding, several = [], [], []
    for seed in range(12):
        S, T = _problem(3, 4, seed)
        best = _exhaustive(S, T, levels, rows_apart=rows_apart)
        found = solve(S, T, form)
        assert found.relaxed <= best
        assert found.achieved >= best * (1 - 1e-5)
        plain = form.encode(T)
        starts = [
            form.quantized(T, plain.scales * factor, None) for factor in (2.0, 1.6, 1.3, 0.85, 0.7, 0.5, 0.4, 0.3)
        ]
        more = solve(S, T, form, starts=starts).achieved
        assert best * (1 - 1e-5) <= more <= found.achieved
        excess.append(found.achieved / best - 1)
        rounding.append(found.rounded / best - 1)
        several.append(more / best - 1)
    # A local optimum need not be the global one; rounding is the control that shows what is at stake.
    assert sum(excess) < 0.35 * sum(rounding)
    assert sum(several) < 0.08 * sum(rounding)
    assert sum(e < 1e-4 for e in several) >= 4  # all three rows at once


def _slow_sweep(S: Tensor, T: Tensor, W: Tensor, allowed: Tensor) -> Tensor:
    """Coordinate descent as it is written down: one weight at a time, trying every level of it."""
    W = W.clone()
    for j, i in itertools.product(range(W.shape[1]), range(W.shape[0])):
        trials = []
        for level in allowed[i, j]:
            W[i, j] = level
            trials.append(float((W[i] - T[i]) @ S @ (W[i] - T[i])))
        W[i, j] = allowed[i, j][trials.index(min(trials))]
    return W


@pytest.mark.parametrize("name", ["binary", "ternary", "int2:group=7", "int3:affine", "int3:group=7,minimum,blocks=2"])
def test_a_sweep_is_what_trying_every_level_of_every_weight_gives(name: str) -> None:
    S, T = _problem()
    form = parse_format(name)
    inner = form.inner if isinstance(form, Masked) else form
    start = form.encode(T)
    descent = Descent(S, T, inner, start)
    changed = descent.sweep()
    codes = range(inner.levels.low, inner.levels.high + 1, inner.levels.step)
    every = [Encoded(torch.full_like(start.codes, c), start.scales, start.zeros, start.support) for c in codes]
    allowed = torch.stack([form.decode(each).double() for each in every], dim=-1)  # [d_out, d_in, levels]
    slow = _slow_sweep(S, T, form.decode(start).double(), allowed)
    torch.testing.assert_close(form.decode(descent.encoded()).double(), slow, rtol=1e-6, atol=1e-7)
    assert changed == int((slow - form.decode(start).double()).abs().gt(1e-6).sum()) > 0


def _slow_feedback(S: Tensor, T: Tensor, form: Scaled, start: Encoded) -> Tensor:
    """Round a column, then solve for the best dense values of all that are left; damped as the fast one is."""
    S = S + 0.01 * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype)
    scales = start.scales.double().expand(len(T), 1)[:, 0]
    order = S.diagonal().argsort(descending=True).tolist()
    W = T.clone()
    for i, column in enumerate(order):
        W[:, column] = scales * form.levels.nearest(W[:, column] / scales)
        fixed, left = order[: i + 1], order[i + 1 :]
        if left:
            push = (W[:, fixed] - T[:, fixed]) @ S[fixed][:, left]
            W[:, left] = T[:, left] - torch.linalg.solve(S[left][:, left], push.T).T
    return W


@pytest.mark.parametrize("name", ["binary", "ternary", "int3"])
def test_error_feedback_leaves_the_columns_behind_where_they_are_best(name: str) -> None:
    S, T = _problem()
    form = parse_format(name)
    start = form.encode(T)
    descent = Descent(S, T, form, start)
    descent.feed_back()
    found = form.decode(descent.encoded()).double()
    torch.testing.assert_close(found, _slow_feedback(S, T, form, start), rtol=1e-6, atol=1e-7)
    assert _error(S, found, T) < 0.9 * _error(S, form.decode(start).double(), T)


@pytest.mark.parametrize("name", SCALED)
def test_every_sweep_goes_down_and_the_numbers_are_those_of_the_codes(name: str) -> None:
    S, T = _problem()
    form = parse_format(name)
    found = solve(S, T, form, tolerance=0.0)
    history = torch.tensor(found.history)
    assert len(history) > 2
    assert (history[1:] <= history[:-1] * (1 + 1e-9)).all()
    assert found.achieved == pytest.approx(_error(S, form.decode(found.encoded).double(), T), rel=1e-6)
    assert found.rounded == pytest.approx(_error(S, form.project(T).double(), T), rel=1e-6)
    assert found.relaxed <= found.achieved <= found.history[-1] * (1 + 1e-5)
    assert found.achieved < 0.8 * found.rounded
    again = form.encode(form.decode(found.encoded)) if name == "int8" else found.encoded
    assert again.scales.dtype == found.encoded.scales.dtype


@pytest.mark.parametrize("name", SCALED)
def test_refitting_moves_scales_and_offsets_to_where_the_error_is_lowest(name: str) -> None:
    S, T = _problem(4, 14)
    form = parse_format(name)
    inner = form.inner if isinstance(form, Masked) else form
    descent = Descent(S, T, inner, form.encode(T))
    for _ in range(60):
        descent.refit()
    best = descent.encoded()
    lowest = _error(S, form.decode(best).double(), T)
    for part in ("scales", "zeros"):
        values = getattr(best, part)
        if values is None:
            continue
        steps = (1.02, 0.98) if values.is_floating_point() else (1, -1)
        for index, step in itertools.product(range(values.numel()), steps):
            moved = values.clone()
            flat = moved.view(-1)
            flat[index] = (
                flat[index] * step
                if values.is_floating_point()
                else min(max(int(flat[index]) + step, 0), inner.levels.high)
            )
            other = Encoded(
                best.codes, *((moved, best.zeros) if part == "scales" else (best.scales, moved)), best.support
            )
            assert _error(S, form.decode(other).double(), T) >= lowest * (1 - 1e-9)


def test_one_scale_for_the_whole_model_is_shared_and_fits_all_matrices() -> None:
    problems = [_problem(seed=seed) for seed in range(3)]
    problems[1] = (problems[1][0], 3 * problems[1][1])
    form = parse_format("binary:model,scale=float32")
    found = solve_together(problems, form)
    scales = {float(reference.encoded.scales) for reference in found}
    assert len(scales) == 1
    total = sum(reference.achieved for reference in found)
    for factor in (0.99, 1.01):
        moved = sum(
            _error(S, factor * form.decode(r.encoded).double(), T) for (S, T), r in zip(problems, found, strict=True)
        )
        assert moved > total
    # Control: a scale of its own for each matrix is better, and they differ.
    apart = [solve(S, T, form) for S, T in problems]
    assert sum(reference.achieved for reference in apart) < total
    assert len({float(reference.encoded.scales) for reference in apart}) == 3


def test_the_weights_in_use_are_a_start_that_can_only_be_improved_on() -> None:
    S, T = _problem()
    for name in ("int3", "int3:tensor"):
        form = parse_format(name)
        best = solve(S, T, form, tolerance=0.0, max_sweeps=100)
        again = solve(S, T, form, starts=[best.encoded], max_sweeps=1)
        assert again.achieved <= best.achieved * (1 + 1e-9)
        assert solve(S, T, form, max_sweeps=1).achieved > best.achieved  # control: one sweep alone is not enough


def test_the_lowest_on_a_support_is_least_squares_of_every_row() -> None:
    S, T = _problem(4, 8)
    support = torch.rand(4, 8, generator=torch.Generator().manual_seed(1)) < 0.6
    support[:, 0] = True
    S[:, 1] = S[1] = 0.0  # an input that never fires
    W = lowest_on_support(S, T, support)
    assert (W[~support] == 0).all()
    for i in range(4):
        columns = support[i].nonzero().flatten()
        expected = T[i] @ S[:, columns] @ torch.linalg.pinv(S[columns][:, columns])
        full = torch.zeros(8, dtype=torch.float64)
        full[columns] = expected
        assert float(quadratic(S, (W - T)[i : i + 1])) == pytest.approx(_error(S, full[None], T[i : i + 1]), rel=1e-6)
    masked = solve(S, T, Masked(parse_format("dense"), Given(support)))
    assert masked.relaxed == pytest.approx(masked.achieved, rel=1e-4)
    bits = solve(S, T, Masked(parse_format("int2"), Given(support)))
    assert masked.relaxed <= bits.achieved
    assert bits.relaxed == pytest.approx(masked.relaxed, rel=1e-6)


def test_dead_inputs_zero_rows_and_constant_rows_are_handled() -> None:
    S, T = _problem(4, 14)
    S[:, :3] = S[:3] = 0.0
    T[0], T[1] = 0.0, 0.25
    for name in ("binary", "ternary", "int4", "int4:affine", "int4:group=7,minimum", "ternary:blocks=2"):
        form = parse_format(name)
        found = solve(S, T, form)
        assert 0 <= found.relaxed <= found.achieved <= found.rounded
        assert (form.decode(found.encoded)[0] == 0).all()
    assert solve(S, torch.zeros_like(T), parse_format("binary")).achieved == 0.0
    assert solve(torch.zeros_like(S), T, parse_format("int2")).achieved == 0.0


def test_a_negative_scale_in_use_is_a_start_like_any_other() -> None:
    S, T = _problem(4, 14)
    for name in ("int3", "ternary:channel"):
        form = parse_format(name)
        start = form.quantized(T, -form.encode(T).scales, None)
        found = solve(S, T, form, starts=[start])
        assert found.achieved <= _error(S, form.decode(start).double(), T)
        if name != "int3":
            assert (found.encoded.scales > 0).all()


def test_a_dead_row_in_use_is_revived() -> None:
    S, T = _problem()
    form = parse_format("ternary:channel")
    dead = form.encode(T)
    dead.scales[2] = 0
    assert float(quadratic(S, form.decode(dead).double() - T)[2]) == pytest.approx(float(quadratic(S, -T)[2]))
    found = solve(S, T, form, starts=[dead])
    assert float(found.encoded.scales[2]) > 0


def test_float32_finds_what_float64_finds() -> None:
    S, T = _problem()
    for name in ("binary", "int4:affine"):
        one, two = solve(S, T, parse_format(name)), solve(S.float(), T.float(), parse_format(name))
        assert two.achieved == pytest.approx(one.achieved, rel=0.02)
        half = solve(S.bfloat16(), T.bfloat16(), parse_format(name))  # computed in float32 at least
        assert half.achieved == pytest.approx(one.achieved, rel=0.2)


def test_the_split_tells_poor_codes_from_few_bits() -> None:
    S, T = _problem()
    form = parse_format("ternary:channel,blocks=2")
    best = solve(S, T, form, tolerance=0.0)
    poor = best.encoded.codes.clone()
    poor[:, ::5] = 0
    parts = {}
    for name, encoded in (("best", best.encoded), ("poor", replace(best.encoded, codes=poor))):
        current = float(quadratic(S, form.decode(encoded).double() - T).sum())
        found = split(solve(S, T, form, starts=[encoded], tolerance=0.0), current, irreducible=2.0)
        total = found.irreducible + found.price_of_precision + found.left_on_the_table
        assert total == pytest.approx(2.0 + current, rel=1e-9)
        assert found.irreducible == pytest.approx(2.0 + best.relaxed, rel=1e-6)
        parts[name] = found.left_on_the_table / current
    assert parts["best"] < 0.05  # control
    assert parts["poor"] > 0.15
    with pytest.raises(FormatError, match="Give their codes to solve"):
        split(solve(S, T, form, max_sweeps=1, feedback=False), best.achieved * 0.9)


def test_dense_is_the_target_itself() -> None:
    S, T = _problem()
    assert solve(S, T, parse_format("dense")).achieved < 1e-12
    assert 0 < solve(S, T, parse_format("dense:bfloat16")).achieved < 1e-4


def test_problems_that_do_not_fit_together_are_refused() -> None:
    S, T = _problem(3, 8)
    with pytest.raises(FormatError, match=r"S: expected \[8, 8\]"):
        solve(S[:4, :4], T, parse_format("int4"))
    with pytest.raises(FormatError, match="S holds NaN"):
        solve(S * float("nan"), T, parse_format("int4"))
    with pytest.raises(FormatError, match="group=3 does not divide"):
        solve(S, T, parse_format("int4:group=3"))
    support = BlockDiagonal(1).support(T)
    support[1] = False
    with pytest.raises(FormatError, match="row 1 has no weight"):
        solve(S, T, Masked(parse_format("int4"), Given(support)))
    with pytest.raises(FormatError, match="same number"):
        solve_together([(S, T)] * 2, parse_format("int4"), starts=[[], [parse_format("int4").encode(T)]])
