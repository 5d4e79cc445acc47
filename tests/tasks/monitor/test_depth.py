"""Signals of a check beside a training: the check's own numbers, within the budget, and nothing of the training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import peelwise
from audits import runner_of, tiny_probe, trained_beside
from peelwise.engine.depth.table import DepthTable, pass_table
from peelwise.errors import OptionError
from peelwise.model.architectures import find_blocks
from peelwise.model.parts import parts_of
from peelwise.records.run import Measurement
from peelwise.records.signals import FROM_BACKWARD, FROM_FORWARD, FROM_WEIGHTS, OVER_DEPTH, of_kinds, over_depth
from peelwise.store.reader import RunReader
from peelwise.tasks.monitor.depth import SCORE, DepthSignals, over_blocks
from zoo import ZOO

ROW = Measurement(10, "ranking", 2.0, 0.1, 0.01, "???")


def noted(depth: DepthSignals, *, spent: float = 0.0, elapsed: float = 1e6) -> dict[str, dict[int, float]]:
    torch.manual_seed(0)
    model = ZOO["llama"]().eval()
    row = depth.noted(
        ROW, model, find_blocks(model), tiny_probe(), micro_batch_tokens=4096, spent=spent, elapsed=elapsed
    )
    found: dict[str, dict[int, float]] = {}
    for each in row.statistics:
        found.setdefault(each.name, {})[each.block] = each.value
    return found


def test_values_are_those_of_the_check_over_a_blocks_parts() -> None:
    torch.manual_seed(0)
    model = ZOO["llama"]().eval()
    blocks = find_blocks(model)
    with torch.no_grad():
        runner = runner_of(model)
        table = pass_table(runner, [parts_of(block) for block in blocks], runner.trace(tiny_probe().select))
    found = noted(DepthSignals(("gain_slope", "block_influence", "weight_rms"), None, 0.0))
    assert set(found) == {"gain_slope", "block_influence", "weight_rms"}
    for block in blocks:
        slopes = [row[block.index] for (name, _), row in table.values.items() if name == "gain_slope"]
        farthest = max((s for s in slopes if s is not None), key=abs)
        assert found["gain_slope"][block.index] == pytest.approx(farthest, rel=1e-5)
        assert found["block_influence"][block.index] == pytest.approx(table.values["block_influence", ""][block.index])
        sizes = [float(linear.weight().square().mean().sqrt()) for linear in block.linears]
        assert found["weight_rms"][block.index] == pytest.approx(np.mean(sizes), rel=1e-5)


def test_of_one_sided_signals_the_part_that_says_most_counts() -> None:
    table = DepthTable(1)
    for part, value in (("q", 0.2), ("k", 0.9)):
        table.put("head_similarity", part, 0, value)  # high is unlike
        table.put("smallest_head_share", part, 0, value)  # low is
    assert over_blocks(table) == {0: {"head_similarity": 0.9, "smallest_head_share": 0.2}}


def test_the_cheapest_come_first_and_no_more_than_the_budget_pays() -> None:
    asked = ("gain_slope", "block_influence", "weight_rms")
    depth = DepthSignals(asked, 0.1, per_token=1e-3)
    cost = sum(depth._guess(group, find_blocks(ZOO["llama"]()), tiny_probe()) for group in (FROM_BACKWARD,))
    # The share may be above the budget by half of what is begun: with nothing spent, this is where it fits by itself.
    just = cost * (0.5 - 0.1) / 0.1 + 1e-6
    assert set(noted(depth, elapsed=just)) == {"gain_slope"}
    assert noted(DepthSignals(asked, 0.1, per_token=1e-3), elapsed=0.9 * just) == {}
    assert set(noted(DepthSignals(asked, 0.1, per_token=1e-3), elapsed=1e6)) == set(asked)
    assert noted(DepthSignals(asked, 0.1, per_token=1e-3), spent=1e6, elapsed=1e6) == {}


def test_what_a_group_took_decides_from_then_on() -> None:
    depth = DepthSignals(("gain_slope",), 0.1, per_token=1e-12)
    assert noted(depth)
    depth._costs[FROM_BACKWARD] = 1e9
    assert noted(depth) == {}


def test_a_monitored_run_has_all_of_them_with_the_score_and_is_not_changed(tmp_path: Path) -> None:
    events: list[peelwise.Event] = []

    def trained(watched: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = _deep()
        options = {"budget": None, "schedule": peelwise.every(1), "store": tmp_path / "run.db", "signals": ("all",)}
        options["on_event"] = events.append
        return trained_beside(
            model, (lambda o: peelwise.Monitor(model, tiny_probe(), optimizer=o, **options)) if watched else None
        )

    plain, watched = trained(False), trained(True)
    assert "no-signals" not in [event.kind for event in events]
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    reader = RunReader(tmp_path / "run.db")
    run = reader.latest()
    assert run.info.settings["signals"] == ["all"]
    for name in (SCORE, "gain_slope", "marginal_evidence", "block_influence", "stable_rank", "row_dispersion"):
        newest = reader.newest(run.id, name)
        assert set(newest) == set(range(6)), name
        assert newest[0]["to_median"] is not None, name


def _deep() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 97}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, **sizes))


def test_of_a_model_without_depth_there_is_no_score() -> None:
    found = noted(DepthSignals(over_depth(("all",)), None, 0.0))
    assert SCORE not in found
    assert {s.kind for s in of_kinds(OVER_DEPTH) if s.name in found} >= {*FROM_BACKWARD, "stream", "update", "matrix"}
    assert any(signal.name in found for signal in of_kinds(FROM_WEIGHTS))
    assert any(signal.name in found for signal in of_kinds(FROM_FORWARD))


def test_a_signal_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(OptionError, match=r"no signal 'slope'\. Known: .*gain_slope"):
        peelwise.Monitor(ZOO["llama"](), tiny_probe(), store=None, signals=("slope",))
