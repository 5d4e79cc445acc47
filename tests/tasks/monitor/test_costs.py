"""What measurements are expected to take: passes, and solves that few tokens do not make cheaper."""

from __future__ import annotations

import pytest
from torch import nn

from audits import tiny_probe
from peelwise.distributed.processes import ONE_PROCESS
from peelwise.engine.proposals import operations
from peelwise.model.architectures import find_blocks
from peelwise.model.layers import parameter_count
from peelwise.tasks.monitor.costs import Costs, solve_tokens
from peelwise.tasks.monitor.planner import PLAN, Planner
from peelwise.tasks.monitor.sizes import affordable_tokens, part_of, tokens_of
from zoo import ZOO


def test_operations_are_those_of_its_products() -> None:
    # 13 d^3, 8 o d^2 of the one side, and o^3 / 3 + 6 o^2 d + 4 o d^2 of the other, for every layer
    assert operations(10, [2], two_sided=False) == 13 * 1000 + 8 * 2 * 100
    one = operations(10, [2])
    assert one == pytest.approx(13 * 1000 + 8 * 200 + 8 / 3 + 6 * 4 * 10 + 4 * 200)
    assert operations(10, [2, 2]) == pytest.approx(2 * one - 13 * 1000)
    assert operations(10, [2], targets=2) == pytest.approx(2 * one - 13 * 1000)


def test_solves_are_worth_the_tokens_that_take_as_many_operations() -> None:
    model = ZOO["llama"]()
    blocks = find_blocks(model)
    linears = [m for block in blocks for m in block.module.modules() if isinstance(m, nn.Linear)]
    expected = sum(operations(m.in_features, [m.out_features]) for m in linears)
    assert solve_tokens(blocks, parameter_count(model)) == pytest.approx(expected / (2 * parameter_count(model)))


def test_a_measurement_takes_what_the_last_took_and_more_for_more_tokens() -> None:
    probe = tiny_probe()
    half = part_of(probe, tokens_of(probe) // 2)
    more = tokens_of(probe) - tokens_of(half)
    costs = Costs(per_token=0.01, solves=1000.0)
    assert costs.of("alone", half) == pytest.approx(0.01 * (8 * tokens_of(half) + 2000))
    assert costs.of("slopes", half) == pytest.approx(0.01 * 3.5 * half.report.tokens)
    costs.took("alone", half, 7.0)
    # The rate is what the measurement showed, for kinds that were not made yet too.
    rate = 7.0 / (8 * tokens_of(half) + 2000)
    assert costs.of("alone", half) == 7.0
    assert costs.of("alone", probe) == pytest.approx(7.0 + rate * 8 * more)
    assert costs.of("ranking", half) == pytest.approx(rate * (5 * tokens_of(half) + 1000))
    costs.took("joint", half, 1e6, failed=True)
    assert costs.per_token == pytest.approx(rate)


def test_solves_are_paid_before_tokens() -> None:
    # 0.03 * 60 s pay for 18,000 tokens forward: 2,250 probe tokens, or 1,250 beside solves worth 4,000
    assert affordable_tokens(12_000, 1e-4, 0.03) == 2048
    assert affordable_tokens(12_000, 1e-4, 0.03, solves=4_000.0) == 1024


@pytest.mark.parametrize(("solves", "first"), [(0.0, "alone"), (1e6, "slopes")])
def test_gain_slopes_come_first_where_what_decides_is_far_dearer(solves: float, first: str) -> None:
    probe, budget = tiny_probe(), 0.03
    planner = Planner(probe, PLAN, budget, 1e-4, ONE_PROCESS, solves)
    costs, kinds = Costs(1e-4, solves), []
    spent = elapsed = on_slopes = 0.0
    while "alone" not in kinds:
        elapsed += 0.1
        kind = planner.due(spent, elapsed, 1.0)
        if kind is None:
            continue
        seconds = costs.of(kind, planner.probe)
        planner.begin(kind)
        planner.took(kind, seconds)
        spent, elapsed = spent + seconds, elapsed + seconds
        on_slopes += seconds if kind == "slopes" else 0.0
        kinds.append(kind)
        # Half a measurement early at most, and slopes a third of that which the budget has paid for.
        assert spent <= budget * elapsed + seconds / 2
        assert on_slopes <= budget * elapsed / 3 + costs.of("slopes", planner.probe)
    assert kinds[0] == first
    planner.begin("joint")
    assert planner.due(spent, elapsed + 1e6, 1.0) != "slopes"
