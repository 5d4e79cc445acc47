"""What follows from an anatomy's numbers."""

import itertools

import numpy as np
import pytest

from peelwise.evidence.anatomy import better_without, correlations, rank_correlation, tolerated
from peelwise.records.anatomy import ABLATIONS, BlockAnatomy, Recovery
from peelwise.records.base import Interval


def interval(mean, error=0.01):
    return Interval(
        mean=mean, low=mean - 2 * error, high=mean + 2 * error, standard_error=error, sequences=40, method="student-t"
    )


def blocks_with(costs, error=0.01):
    return [
        BlockAnatomy(index=i, name=f"b{i}", ablation={"skipped": interval(c, error), "mlp": interval(abs(c) + 1)})
        for i, c in enumerate(costs)
    ]


def test_only_what_is_surely_better_is_named():
    found = better_without(blocks_with([0.5, -0.2, -0.015, 0.1]))  # the third lies 1.5 errors below 0
    assert [(each.block, each.ablation) for each in found] == [(1, "skipped")]


def test_asking_about_many_blocks_asks_for_more_certainty():
    alone = better_without(blocks_with([-0.022]))
    many = better_without(blocks_with([-0.022] + [0.5] * 29))
    assert len(alone) == 1
    assert many == ()


def test_healthy_blocks_are_rarely_named():
    draw = np.random.default_rng(0)
    named = 0
    for _ in range(200):  # blocks that change nothing, five ways: a family-wise error of 5 %
        costs = draw.normal(size=(12, len(ABLATIONS))) * 0.01
        blocks = [
            BlockAnatomy(index=i, name="", ablation={way: interval(c) for way, c in zip(ABLATIONS, row, strict=True)})
            for i, row in enumerate(costs)
        ]
        named += bool(better_without(blocks))
    assert named <= 20


def test_tolerated_is_the_last_before_an_upper_end_leaves_the_margin():
    costs = [interval(0.0), interval(0.01), interval(0.2), interval(0.0)]
    assert tolerated((1, 2, 3, 4), costs, 0.05) == 2
    assert tolerated((1, 2, 3, 4), costs, 0.025) == 1
    assert tolerated((1, 2, 3, 4), costs, 0.01) is None
    assert tolerated((1, 2, 3, 4), costs[:1], 0.05) == 1  # no more was measured


def test_rank_correlation_against_scipy_and_the_chance_of_a_perfect_order():
    from scipy.stats import spearmanr

    draw = np.random.default_rng(1)
    for _ in range(20):
        x, y = draw.integers(0, 6, 12), draw.normal(size=12)  # with ties
        rho, p = rank_correlation(x, y)
        expected = spearmanr(x, y)
        assert rho == pytest.approx(expected.statistic)
        assert p == pytest.approx(expected.pvalue)
    perfect = sum(order == (0, 1, 2, 3, 4) or order == (4, 3, 2, 1, 0) for order in itertools.permutations(range(5)))
    assert rank_correlation(range(5), [1, 2, 4, 8, 9]) == (1.0, perfect / 120)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_columns_are_compared_with_ablation_and_recovery():
    costs = [float(i) for i in range(12)]
    blocks = [
        block.model_copy(
            update={
                "signals": {"with": 10.0 - i, "random": [3, 11, 4, 1.5, 9, 2, 6, 5, 3.5, 8, 1.7, 7][i]}
                | ({"missing": 1.0 * i} if i else {}),
                "recovery": Recovery(damage=interval(1.0), left=interval(0.5), share=0.01 * i * i),
            }
        )
        for i, block in enumerate(blocks_with(costs))
    ]
    found = {(each.target, each.column): each for each in correlations(blocks)}
    assert found["skipped", "with"].rho == -1
    assert found["skipped", "with"].significant
    assert not found["skipped", "random"].significant
    assert found["recovery", "ablation.skipped"].rho == 1
    assert not any(column == "missing" for _, column in found)
    assert ("skipped", "ablation.skipped") not in found
    assert correlations(blocks[:4]) == ()
