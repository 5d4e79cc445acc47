"""`anatomy` as people call it: a folder, a module, files, what is refused."""

import json
import math

import pytest

import peelwise
from audits import tiny_probe
from peelwise.errors import ModelError, OptionError, OutputError
from stages import stage_folder
from zoo import ZOO

QUICK = peelwise.AnatomySettings("60s", ("ablation",))


def test_a_folder_is_studied_and_the_report_saved(tmp_path):
    probe = peelwise.ProbeOptions(tokens=1_200, sequence_length=32)
    report = peelwise.anatomy(stage_folder("final"), probe, QUICK, out=tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "anatomy.json").read_text())
    assert saved["kind"] == "anatomy"
    assert saved["blocks"][0]["ablation"]["skipped"]["mean"] == report.record.blocks[0].ablation["skipped"].mean
    skipped = saved["blocks"][0]["ablation"]["skipped"]["mean"]
    assert saved["blocks"][0]["perplexity_ratios"]["skipped"] == pytest.approx(math.exp(skipped))
    assert report.to_frame()["skipped_perplexity_ratio"][0] == pytest.approx(math.exp(skipped))
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
    assert "Without block 0 the loss rises most" in str(report)
    frame = report.to_frame()
    assert len(frame) == 6
    assert frame.loc[0, "skipped_mean"] > frame.loc[1, "skipped_mean"]
    with pytest.raises(OutputError, match="not empty"):
        peelwise.anatomy(stage_folder("final"), probe, QUICK, out=tmp_path / "out")
    peelwise.anatomy(stage_folder("final"), probe, QUICK, budget=30, out=tmp_path / "out", force=True)
    assert json.loads((tmp_path / "out" / "anatomy.json").read_text())["settings"]["budget_seconds"] == 30


def test_a_budget_that_ended_is_gone_on_from_and_a_finished_anatomy_leaves_nothing_behind(tmp_path):
    probe, out = peelwise.ProbeOptions(tokens=1_200, sequence_length=32), tmp_path / "out"
    unfinished = tmp_path / "out.unfinished"

    def watcher(progress):  # ends the work as Ctrl-C does, behind the third block
        if progress.stage == "ablation" and progress.done == 3:
            raise KeyboardInterrupt

    first = peelwise.anatomy(stage_folder("final"), probe, QUICK, out=out, progress=watcher).record
    assert not first.complete
    assert [bool(block.ablation) for block in first.blocks] == [True] * 3 + [False] * 3
    assert (unfinished / "found.json").is_file()
    with pytest.raises(OutputError, match="of something else"):
        peelwise.anatomy(stage_folder("early"), probe, QUICK, out=out)
    seen = []
    again = peelwise.anatomy(stage_folder("final"), probe, QUICK, out=out, progress=seen.append).record
    assert again.complete
    assert again.blocks[:3] == first.blocks[:3]
    assert all(block.ablation for block in again.blocks)
    assert not unfinished.exists()
    assert json.loads((out / "anatomy.json").read_text())["complete"]


def test_a_module_needs_a_probe_and_settings_come_without_torch():
    assert len(peelwise.anatomy(ZOO["plain"](), tiny_probe(), QUICK).record.blocks) == 3
    with pytest.raises(ModelError, match="A module has no tokenizer"):
        peelwise.anatomy(ZOO["plain"]())
    with pytest.raises(OptionError, match="A budget is"):
        peelwise.AnatomySettings("soon")
