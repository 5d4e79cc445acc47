"""The library as people use it."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

import peelwise
from audits import ONE_ROUND, Snapshot, numbers, slow_losses, tiny_probe
from peelwise.api import certificate as api
from peelwise.errors import CertificateError, MissingExtraError, ModelError, OutputError, PeelwiseError
from peelwise.records.audit import AuditRecord
from peelwise.records.files import read_any_record
from peelwise.records.options import parse_seconds
from peelwise.tasks.audit.run import run_audit
from stages import stage_folder
from zoo import ZOO


def python(code, *arguments):
    """Run code in a process of its own and return what it printed."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_light():
    heavy = python("import sys, peelwise; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])")
    assert heavy == "[]"
    assert python("import sys, peelwise; peelwise.Probe; print('torch' in sys.modules)") == "True"


def test_what_is_imported_when_it_is_needed_leaves_random_numbers_alone():
    code = (
        "import random, peelwise; before = random.getstate(); peelwise.quantcheck; print(random.getstate() == before)"
    )
    assert python(code) == "True"
    assert python(code.replace("peelwise.quantcheck", "import rich.style")) == "False"  # what would be the reason


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'adit'"):
        peelwise.adit  # noqa: B018
    assert all(hasattr(peelwise, name) for name in peelwise.__all__)


def test_audit_of_a_module_is_the_audit_of_the_pipeline():
    model = ZOO["llama"]()
    before, seen = Snapshot.of(model), []
    report = peelwise.audit(model, tiny_probe(), ONE_ROUND, name="mine", progress=seen.append)
    before.assert_unchanged(model)
    expected = run_audit(ZOO["llama"](), tiny_probe(), ONE_ROUND, name="mine")
    assert numbers(report.record) == numbers(expected.record)
    assert report.record.model.name == "mine"
    assert len({progress.stage for progress in seen}) == 10
    elapsed = [progress.elapsed_seconds for progress in seen]
    assert elapsed == sorted(elapsed)
    assert 0 < elapsed[0] < elapsed[-1]
    assert [progress.left_seconds for progress in seen] == pytest.approx([600 - spent for spent in elapsed], abs=0.1)


def test_audit_of_a_folder_remembers_where_it_was(audited, broken_folder):
    record = audited[0].record
    assert record.model.source == str(broken_folder)
    assert record.model.name == "broken"
    assert record.model.architecture == "LlamaForCausalLM"
    assert record.informative
    assert record.probe.in_distribution


# -- the report ------------------------------------------------------------------------------------------------


def test_report_prints_every_block(audited):
    report = audited[0]
    text = str(report)
    assert text == str(report)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 110
    assert report.conclusion[:40] in text
    assert f"{report.record.loss.current:.3f}" in text


def test_report_as_json(audited):
    report = audited[0]
    content = json.loads(report.to_json())
    assert content["schema"] == 1
    assert {"model", "probe", "loss", "blocks", "cost", "settings", "seed", "versions"} <= set(content)
    assert AuditRecord.model_validate(content) == report.record


def test_report_as_frame(audited):
    pytest.importorskip("pandas")
    frame, blocks = audited[0].to_frame(), audited[0].record.blocks
    assert frame.index.tolist() == [block.index for block in blocks]
    assert frame["verdict"].tolist() == [block.verdict for block in blocks]
    assert frame["recoverable_mean"].tolist() == [block.recoverable_nats.mean for block in blocks]
    assert frame["unique_low"].tolist() == [block.unique_nats.low for block in blocks]
    assert not any("nats" in column or column == "matrices" for column in frame.columns)


def test_frame_without_pandas_says_how_to_get_it(audited, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r'pip install "peelwise\[frame\]"'):
        audited[0].to_frame()


def test_report_as_html(audited):
    pytest.importorskip("matplotlib")
    page = audited[0].to_html()
    assert page.lstrip().lower().startswith("<!doctype html>")
    saved = peelwise.AuditReport(read_any_record(audited[1]), {}, audited[0].probe)  # it knows the seal of its witness
    assert saved.to_html() == (audited[1] / "report.html").read_text(encoding="utf-8") != page
    for block in audited[0].record.blocks:
        assert f'data-block="{block.index}"' in page


# -- folders -----------------------------------------------------------------------------------------------------


def test_saving_refuses_what_is_there_and_replaces_only_its_own(audited, tmp_path):
    report = audited[0]
    out = report.save(tmp_path / "out")
    assert {"certificate.json", "witness.safetensors", "probe.safetensors"} <= {file.name for file in out.iterdir()}
    with pytest.raises(OutputError, match="--force"):
        report.save(out)
    (out / "old").touch()
    report.save(out, force=True)
    assert not (out / "old").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(OutputError, match="even with --force"):
        report.save(foreign, force=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["foreign", "out"]
    assert [file.name for file in foreign.iterdir()] == ["thesis.tex"]


def test_without_matplotlib_the_certificate_is_saved_all_the_same(audited, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = audited[0].save(tmp_path / "out")
    assert not (out / "report.html").exists()
    assert peelwise.verify(out).holds


@pytest.mark.parametrize("model", ["where it was", "folder", "module"])
def test_verify(audited, broken_folder, model):
    from transformers import AutoModelForCausalLM

    given = {"where it was": None, "folder": broken_folder}.get(model, AutoModelForCausalLM)
    if model == "module":
        given = AutoModelForCausalLM.from_pretrained(broken_folder, dtype=torch.float32)
    assert peelwise.verify(audited[1], given).holds


def test_verify_needs_to_know_the_model(tmp_path):
    report = peelwise.audit(
        ZOO["plain"](), tiny_probe(), peelwise.AuditSettings(joint_rounds=1, solo_rounds=0, controls=False)
    )
    out = report.save(tmp_path / "out")
    with pytest.raises(OutputError, match="--model"):
        peelwise.verify(out)
    assert peelwise.verify(out, ZOO["plain"]()).holds


def test_verify_of_nothing(tmp_path):
    with pytest.raises(CertificateError, match="No certificate"):
        peelwise.verify(tmp_path)


def test_apply_writes_a_model_that_transformers_opens_with_the_certified_loss(audited, broken_folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report, folder = audited
    source = {file.name: file.read_bytes() for file in broken_folder.iterdir()}
    loss = peelwise.apply(folder, None, tmp_path / "better")
    better = AutoModelForCausalLM.from_pretrained(tmp_path / "better", dtype=torch.float32)
    rows = report.probe.report.ids.tolist()
    found = float(slow_losses(better, rows).sum()) / report.probe.report.tokens
    assert found == pytest.approx(report.record.loss.composed, abs=3e-4)
    assert loss == pytest.approx(found, abs=1e-5)
    assert found < report.record.loss.current - 0.5  # the control
    assert AutoTokenizer.from_pretrained(tmp_path / "better")("return")["input_ids"]
    assert {file.name: file.read_bytes() for file in broken_folder.iterdir()} == source
    assert [file.name for file in tmp_path.iterdir()] == ["better"]
    with pytest.raises(OutputError, match="--force"):
        peelwise.apply(folder, None, tmp_path / "better")
    assert peelwise.apply(folder, None, tmp_path / "better", force=True) == loss


def test_apply_never_replaces_the_model_itself(audited, broken_folder, tmp_path):
    own = shutil.copytree(broken_folder, tmp_path / "model")
    (own / "optimizer.pt").touch()
    with pytest.raises(OutputError, match="the model itself"):
        peelwise.apply(audited[1], own, tmp_path / "elsewhere" / ".." / "model", force=True)
    assert (own / "optimizer.pt").exists()


@pytest.mark.parametrize("stage", ["saving", "loss"])
def test_apply_that_fails_writes_nothing(audited, tmp_path, monkeypatch, stage):
    def half(model, tokenizer, folder):
        (folder / "config.json").write_text("{}")
        raise OutputError("disk full")

    if stage == "saving":
        monkeypatch.setattr(api, "save_model", half)
    else:
        monkeypatch.setattr(api.certificates, "report_loss", lambda *_: 9.0)
    with pytest.raises(PeelwiseError, match=r"disk full|has loss 9\.0"):
        peelwise.apply(audited[1], None, tmp_path / "better")
    assert not list(tmp_path.iterdir())


def test_apply_to_another_model_is_refused(audited, tmp_path):
    with pytest.raises(CertificateError, match="not the same model"):
        peelwise.apply(audited[1], stage_folder("early"), tmp_path / "better")
    assert not list(tmp_path.iterdir())


# -- small things ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "seconds"), [(90, 90), (0.5, 0.5), ("90", 90), ("90s", 90), ("1.5 h", 5400), (" 5m ", 300)]
)
def test_budgets(budget, seconds):
    assert parse_seconds(budget) == seconds


@pytest.mark.parametrize("budget", ["", "soon", "-5m", "0", 0, "5d", "5m 3s", "nan", None])
def test_bad_budgets(budget):
    with pytest.raises(PeelwiseError, match="A budget is a positive time"):
        parse_seconds(budget)


def test_missing_folder():
    with pytest.raises(ModelError, match="not found"):
        peelwise.audit("no/such/folder", tiny_probe())


def test_star_import_needs_no_extra():
    code = "import sys; sys.modules['transformers'] = None; from peelwise import *"
    code += "; print(Monitor.__name__, 'attach' in dir())"
    assert python(code) == "Monitor False"
    assert "attach" in peelwise.__all__  # where its extra is installed
