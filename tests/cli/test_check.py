"""`peelwise check`: exit codes, what it prints, and what it leaves in a folder."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from peelwise.cli import terminal as cli_terminal
from peelwise.engine.clock import Progress
from peelwise.probe.texts import reference_prose
from peelwise.records.check import CheckRecord
from stages import stage_folder

BLOCK = 3


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    from small_gpt.text import training_documents

    file = tmp_path_factory.mktemp("text") / "mine.txt"
    file.write_text("\n\n".join(document[:1_500] for document in training_documents()[::24]), encoding="utf-8")
    return file


def test_a_block_that_subtracts_is_named_in_words_with_its_proof_and_fails_if_asked(run, broken_folder, text, tmp_path):
    out = tmp_path / "out"
    options = ("--text", text, "--in-distribution", "--fail-on", "unlike", "--out", out)
    code, printed, progress = run("check", broken_folder, *options)
    assert code == 1
    words = " ".join(printed.split())
    assert "unlike" in words
    assert "Multiplying what the MLP gives by -0." in words
    assert "▲" in printed
    assert all(stage in progress for stage in ("signals of the weights", "gain witnesses", "ablation"))
    record = CheckRecord.model_validate_json((out / "certificate.json").read_text())
    assert record.unlike is not None
    assert BLOCK in [each.block for each in record.unlike]
    assert record.probe is not None
    assert record.probe.source == "mine.txt"
    assert record.probe.fit_tokens + record.probe.select_tokens + record.probe.report_tokens <= 2_048
    page = (out / "report.html").read_text()
    assert f"<h3>Block {BLOCK}: score" in page
    code, _, error = run("check", broken_folder, "--out", out)
    assert code == 2
    assert "--force" in error


def test_json_of_weights_alone_and_nothing_else(run):
    code, out, _ = run("check", stage_folder("early"), "--no-text", "--json", "--signals", "weight_rms, stable_rank")
    assert code == 0
    record = json.loads(out)
    assert record["kind"] == "check"
    assert record["probe"] is None
    assert {note["code"] for note in record["notes"]} == {"no-text"}
    assert {key.partition(".")[0] for key in record["blocks"][0]["signals"]} == {"weight_rms", "stable_rank"}
    assert record["settings"]["signals"] == "weight_rms,stable_rank"


@pytest.mark.parametrize(("named", "expected"), [((), 0), ((BLOCK,), 1)])
def test_fail_on_is_about_named_blocks(named, expected, run, monkeypatch):
    from peelwise.api import check as api
    from show.check_sample import checked

    monkeypatch.setattr(api, "run_check", lambda *_, **__: checked(6, named=named))
    assert run("check", stage_folder("early"), "--no-text", "--fail-on", "unlike")[0] == expected
    assert run("check", stage_folder("early"), "--no-text")[0] == 0


BAD = {
    "unknown signal": (["--signals", "nonsense"], "there is no signal 'nonsense'"),
    "text and none": (["--no-text", "--text", "{text}"], "exclude each other"),
    "missing text": (["--text", "{tmp}/none.txt"], "none.txt"),
    "output is a file": (["--out", "{text}"], "is a file"),
    "output is somebody else's": (["--out", "{tmp}", "--force"], "even with --force"),
    "bad fail-on": (["--fail-on", "red"], "'red'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error_and_writes_nothing(name, run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(reference_prose()[0], encoding="utf-8")
    options, words = BAD[name]
    code, out, error = run("check", stage_folder("early"), *(o.format(text=text, tmp=tmp_path) for o in options))
    assert code == 2
    assert out == ""
    assert words in " ".join(error.split())
    assert "Traceback" not in error
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


def test_progress_without_a_budget_is_that_of_the_stage(monkeypatch):
    console = Console(force_terminal=True, width=120, color_system=None, record=True, file=None)
    monkeypatch.setattr(cli_terminal, "stderr", console)
    with cli_terminal.progress_bar("Opening ...") as watch:
        watch(Progress("weight-signals", 3, 6, 61.0, float("inf")))
    assert cli_terminal._progress(Progress("weight-signals", 3, 6, 61.0, float("inf"))) == (0.5, "1:01 so far")
    assert cli_terminal._progress(Progress("losses", 0, 0, 1.0, float("inf")))[0] == 0.0
    assert cli_terminal._progress(Progress("losses", 0, 0, 1.0, 3.0)) == (0.25, "at most 0:03 left")
