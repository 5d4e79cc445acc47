"""What a comparison leaves: shares of the damage, a page, a picture, and a plan if one is asked for."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import peelwise
from audits import part_of, tiny_probe
from peelwise.api.allocate import read_plan
from peelwise.errors import FormatError, OptionError, OutputError
from peelwise.model.architectures import find_blocks
from peelwise.nn import quantize_
from peelwise.records.quantcheck import QuantcheckRecord
from peelwise.show.quantcheck.report import render_html
from peelwise.show.quantcheck.terminal import render
from peelwise.tasks.quantcheck import in_order, run
from peelwise.tasks.quantcheck.settings import QuantcheckSettings
from zoo import ZOO

QUICK = QuantcheckSettings(max_sweeps=1)


@pytest.fixture(scope="module")
def planned() -> peelwise.QuantcheckReport:
    parent = ZOO["llama"]()
    quantised = copy.deepcopy(parent)
    quantize_(quantised, "int3:group=16")
    return peelwise.quantcheck(quantised, parent, tiny_probe(), QuantcheckSettings(max_sweeps=1, allocate=4.2))


def test_shares_say_which_layer_costs_most(small_gpt, training_probe) -> None:
    """One layer has fewer bits than all others; what is predicted is about what the loss says of it alone."""
    parent, _ = small_gpt("final")
    quantised, alone = copy.deepcopy(parent), copy.deepcopy(parent)
    bad = "model.layers.3.mlp.down_proj"
    names = [m.name for block in find_blocks(parent) for m in block.linears]
    quantize_(quantised, "int8:group=32", skip=[bad])
    quantize_(quantised, "int2:group=32", skip=[name for name in names if name != bad])
    quantize_(alone, "int2:group=32", skip=[name for name in names if name != bad])
    probe = part_of(training_probe, fit=20, select=4, report=20)
    record = peelwise.quantcheck(quantised, parent, probe, QUICK).record
    shares = {layer.name: layer.share for layer in record.layers}
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=lambda name: shares[name]) == bad
    assert shares[bad] > 0.8
    predicted = next(layer.predicted for layer in record.layers if layer.name == bad)
    damage = peelwise.quantcheck(alone, parent, probe, QUICK).record.loss.damage.mean
    assert damage / 3 < predicted < 3 * damage


def test_without_budget_no_share_is_claimed() -> None:
    parent = ZOO["llama"]()
    quantised = copy.deepcopy(parent)
    quantize_(quantised, "int3:group=16")
    record = peelwise.quantcheck(quantised, parent, tiny_probe(), QuantcheckSettings(budget=1e-6)).record
    assert all(layer.share is None and layer.predicted is None for layer in record.layers)
    assert "output error" in render_html(record)


def test_a_folder_has_record_page_picture_and_plan(planned, tmp_path: Path) -> None:
    planned.save(tmp_path / "check")
    record = planned.record
    stored = QuantcheckRecord.model_validate_json((tmp_path / "check" / "quantcheck.json").read_text())
    assert stored == record
    page, drawn = ((tmp_path / "check" / name).read_text() for name in ("report.html", "layers.svg"))
    assert page == planned.to_html() == render_html(record)
    assert drawn in page
    assert drawn.count("<g><title>block ") == len(record.layers)
    assert "% of all</title>" in drawn
    assert planned.conclusion in " ".join(page.split())
    assert "<script" not in page
    for name in ("llm-compressor.yaml", "llama-cpp.txt", "torchao_config.py", "transformers.json"):
        assert (tmp_path / "check" / name).is_file()
    assert read_plan(tmp_path / "check") == record.allocation.plan == read_plan(tmp_path / "check" / "quantcheck.json")
    with pytest.raises(OutputError, match="--force"):
        planned.save(tmp_path / "check")
    planned.save(tmp_path / "check", force=True)


def test_a_name_of_json_gets_the_record_alone(planned, tmp_path: Path) -> None:
    planned.save(tmp_path / "check.json")
    assert json.loads((tmp_path / "check.json").read_text())["kind"] == "quantcheck"
    assert [each.name for each in tmp_path.iterdir()] == ["check.json"]


def test_a_plan_for_the_parent_is_within_its_budget_in_groups_that_divide(planned) -> None:
    plan = planned.record.allocation
    assert plan.bits_per_weight <= 4.2
    assert {form.partition(":")[2].partition(",")[0] for form in plan.formats} == {"group=16"}
    assert plan.model.fingerprint == planned.record.parent.fingerprint
    assert "bits per weight (at most 4.2)" in " ".join(str(planned).split())


def test_a_comparison_without_a_plan_has_none(tmp_path: Path) -> None:
    parent = ZOO["llama"]()
    quantised = copy.deepcopy(parent)
    quantize_(quantised, "int3:group=16")
    record = peelwise.quantcheck(quantised, parent, tiny_probe(), QUICK, out=tmp_path / "check").record
    assert record.allocation is None
    assert render(record) is not None
    with pytest.raises(OutputError, match="is no plan"):
        read_plan(tmp_path / "check")


@pytest.mark.parametrize("bits", [0.0, -1.0, float("inf")])
def test_a_plan_without_bits_is_refused(bits: float) -> None:
    with pytest.raises(OptionError, match="allocate"):
        QuantcheckSettings(allocate=bits)


def test_a_plan_below_the_smallest_format_is_refused_before_the_comparison() -> None:
    parent, steps = ZOO["llama"](), []
    quantised = copy.deepcopy(parent)
    quantize_(quantised, "int4:group=16")
    with pytest.raises(FormatError, match=r"int2:group=16,symmetric takes 3\.00 bits .* the budget is 1\.5"):
        peelwise.quantcheck(
            quantised, parent, tiny_probe(), QuantcheckSettings(allocate=1.5), progress=lambda step: steps.append(step)
        )
    assert steps == []


def test_experts_are_read_by_the_format_that_is_named_and_drawn_as_one() -> None:
    parent = ZOO["mixtral"]()
    settings = peelwise.QuantiseSettings("int4:group=16", max_sweeps=0, curvature=False)
    quantised = peelwise.quantise(parent, tiny_probe(), settings).quantised()
    named = QuantcheckSettings(max_sweeps=1, format="int4:group=16")
    report = peelwise.quantcheck(quantised, parent, tiny_probe(), named)
    experts = [layer for layer in report.record.layers if layer.parameter]
    assert len(experts) == 3 * 4 * 2
    assert {layer.format for layer in experts} == {"int4:group=16,symmetric"}
    assert all(layer.error > 0 for layer in experts)
    assert not any(note.code == "other-tensors" for note in report.record.notes)
    # 12 layers of attention and two parameters of experts in each block.
    assert report.to_html().count("<g><title>block ") == 12 + 3 * 2
    unnamed = peelwise.quantcheck(quantised, parent, tiny_probe(), QUICK).record
    assert len(unnamed.layers) == 12
    assert any(note.code == "other-tensors" for note in unnamed.notes)


def test_experts_without_tokens_have_no_parts() -> None:
    parent = ZOO["mixtral"]()
    with torch.no_grad():
        for name, parameter in parent.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.zero_()  # the same two experts get every token
    quantised = peelwise.quantise(parent, tiny_probe(), peelwise.QuantiseSettings("int4:group=16", max_sweeps=0))
    named = QuantcheckSettings(max_sweeps=1, format="int4:group=16")
    record = peelwise.quantcheck(quantised.quantised(), parent, tiny_probe(), named).record
    unseen = [layer for layer in record.layers if layer.parameter and layer.split is None]
    assert len(unseen) == 3 * 2 * 2
    assert not any(layer.codes for layer in unseen)
    assert "not measured within the budget" not in render_html(record)
    (said,) = (note for note in record.notes if note.code == "few-expert-tokens")
    assert said.values["without"] == 4


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("stage", ["best-weights", "codes"])
def test_an_interrupted_comparison_goes_on_where_it_ended(tmp_path: Path, monkeypatch, stage: str) -> None:
    parent = ZOO["llama"]()
    quantised = copy.deepcopy(parent)
    quantize_(quantised, "int3:group=16")
    whole = peelwise.quantcheck(quantised, parent, tiny_probe(), QUICK).record
    alone, ordered = [], []
    first, second = run._block_alone, in_order._solved
    monkeypatch.setattr(run, "_block_alone", lambda *args: alone.append(args[2].index) or first(*args))
    monkeypatch.setattr(in_order, "_solved", lambda *args: ordered.append(args[1].index) or second(*args))

    def stop(step) -> None:
        if step.stage == stage and step.done == 2:
            raise StopHereError

    with pytest.raises(StopHereError):
        peelwise.quantcheck(quantised, parent, tiny_probe(), QUICK, out=tmp_path / "check.json", progress=stop)
    assert not (tmp_path / "check.json").exists()
    again = peelwise.quantcheck(quantised, parent, tiny_probe(), QUICK, out=tmp_path / "check.json").record
    assert alone == ordered == [0, 1, 2]  # no block twice
    assert again.loss == whole.loss
    assert again.layers == whole.layers
    assert [each.name for each in tmp_path.iterdir()] == ["check.json"]


def test_a_larger_budget_measures_the_rest(tmp_path: Path) -> None:
    parent = ZOO["llama"]()
    quantised = copy.deepcopy(parent)
    quantize_(quantised, "int3:group=16")
    short = QuantcheckSettings(budget=1e-6, max_sweeps=1)
    out = tmp_path / "check"
    assert not peelwise.quantcheck(quantised, parent, tiny_probe(), short, out=out).record.complete
    record = peelwise.quantcheck(quantised, parent, tiny_probe(), QUICK, out=out, force=True).record
    assert record.complete
    assert all(layer.split is not None for layer in record.layers)
    assert [each.name for each in tmp_path.iterdir()] == ["check"]
