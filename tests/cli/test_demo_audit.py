"""The demonstration of audits, on the small GPT instead of the packaged model."""

import json

import pytest
import torch

pytest.importorskip("matplotlib", reason="reports are drawn with matplotlib")

from peelwise.cli.demo_audit import DAMAGED, HEALTHY, PAGE, Plan, damaged, demonstrate
from peelwise.errors import OptionError, OutputError
from stages import stage_folder
from zoo import ZOO

PLAN = Plan(model=str(stage_folder("final")), block=3, tokens=4_800, budget="60s")


def test_the_copy_is_damaged_in_one_block_and_its_spectra_are_not():
    model = ZOO["llama"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = damaged(model, 1)
    changed = [name for name, tensor in twin.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"]
    for name in changed:
        assert torch.equal(torch.linalg.svdvals(twin.state_dict()[name]), torch.linalg.svdvals(before[name]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_block_that_is_not_there_is_refused():
    with pytest.raises(OptionError, match="expected 0 to 2, got 7"):
        damaged(ZOO["llama"](), 7)


@pytest.mark.nightly
def test_both_are_audited_and_shown_on_one_page(tmp_path, stored_stage):
    stored_stage("final")  # a trained model: not for the quick tests
    said = []
    page = demonstrate(tmp_path / "demo", PLAN, force=False, say=said.append)
    records = {
        each: json.loads((tmp_path / "demo" / each / "certificate.json").read_text()) for each in (HEALTHY, DAMAGED)
    }
    assert records[DAMAGED]["loss"]["current"] > records[HEALTHY]["loss"]["current"] + 0.1
    assert [b["verdict"] for b in records[HEALTHY]["blocks"]].count("red") == 0
    assert records[DAMAGED]["blocks"][3]["verdict"] == "red"
    html = page.read_text()
    assert page == tmp_path / "demo" / PAGE
    assert html.count('<ol class="strip"') == 2
    assert "Block 3, which was damaged in the copy, was found: certified under-optimised" in html
    for folder in (HEALTHY, DAMAGED):
        assert f'href="{folder}/report.html"' in html
        assert (tmp_path / "demo" / folder / "report.html").exists()
    assert said[0] == "As it is:"
    assert said[-1] == f"Both on one page: {page}"
    with pytest.raises(OutputError, match="not empty"):
        demonstrate(tmp_path / "demo", PLAN, force=False, say=said.append)
