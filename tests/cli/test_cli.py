"""The command line: exit codes, what it prints, and what it writes or does not."""

import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from peelwise.api import audit as api
from peelwise.cli import terminal as cli_terminal
from peelwise.engine import opening
from peelwise.engine.clock import Progress
from peelwise.probe.texts import reference_prose
from peelwise.records.files import read_record
from peelwise.tasks.audit.run import AuditOutcome
from stages import stage_folder

QUICK = ("--tokens", "1200", "--sequence-length", "32", "--budget", "2s", "--no-controls")
COMMANDS = (
    "check",
    "audit",
    "peel",
    "quantcheck",
    "compare",
    "plan",
    "verify",
    "apply",
    "report",
    "export",
    "watch",
    "serve",
    "demo-training",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text("\n\n".join(reference_prose())[:40_000], encoding="utf-8")
    return file


@pytest.fixture
def certificate(audited, tmp_path):
    return shutil.copytree(audited[1], tmp_path / "certificate")


# -- help and weight ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_of_the_command(command, run):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Example:" in out
    assert f"peelwise {command} " in out


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("peelwise ")


@pytest.mark.parametrize("arguments", [["--help"], ["audit", "--help"], ["--version"], ["report", "DIR"]])
def test_without_torch(arguments, certificate):
    """``--help`` and ``report`` work where torch would not even import."""
    code = "import sys; sys.modules.update(torch=None, transformers=None); import peelwise.cli.main as m; m.main()"
    arguments = [str(certificate) if argument == "DIR" else argument for argument in arguments]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    if arguments[0] == "report":
        assert (certificate / "report.html").stat().st_size > 10_000


# -- audit -------------------------------------------------------------------------------------------------------


def test_audit_writes_a_certificate_that_holds(run, text, tmp_path):
    out = tmp_path / "out"
    code, table, progress = run("audit", stage_folder("middle"), "--text", text, "--out", out, *QUICK)
    assert code == 0
    assert "Loss on report" in table
    assert "statistics of all blocks" in progress
    assert {"certificate.json", "witness.safetensors", "probe.safetensors"} <= {file.name for file in out.iterdir()}
    record = json.loads((out / "certificate.json").read_text())
    assert record["probe"]["source"] == "prose.txt"
    assert record["probe"]["in_distribution"] is False
    assert 1000 < sum(record["probe"][f"{part}_tokens"] for part in ("fit", "select", "report")) <= 1200
    code, printed, _ = run("verify", out, "--full")
    assert code == 0
    assert "holds" in printed
    code, _, error = run("audit", stage_folder("middle"), "--text", text, "--out", out, *QUICK)
    assert code == 2
    assert "--force" in error
    assert json.loads((out / "certificate.json").read_text()) == record


def test_audit_prints_json_and_nothing_else(run, text):
    code, out, _ = run("audit", stage_folder("middle"), "--text", text, "--in-distribution", "--json", *QUICK)
    assert code == 0
    record = json.loads(out)
    assert record["schema"] == 1
    assert record["probe"]["in_distribution"] is True
    assert len(record["blocks"]) == 6


def test_audit_reads_standard_input_and_several_files(run, text, tmp_path):
    lines = tmp_path / "more.jsonl"
    lines.write_text("".join(json.dumps({"body": line}) + "\n" for line in reference_prose()[-3:]))
    files = ("--text", "-", "--text", lines, "--field", "body")
    code, out, _ = run("audit", stage_folder("early"), *files, "--json", *QUICK, stdin=text.read_text())
    assert code == 0
    assert json.loads(out)["probe"]["source"] == "standard input, more.jsonl"


def test_a_broken_block_fails_the_run_if_asked(run, broken_folder, text, tmp_path):
    options = (
        "--in-distribution",
        "--fail-on",
        "red",
        "--out",
        tmp_path / "out",
        *QUICK,
        "--budget",
        "30s",
    )
    code, table, _ = run("audit", broken_folder, "--text", text, *options)
    assert code == 1
    assert "certified under-optimised" in table
    assert (tmp_path / "out" / "certificate.json").exists()  # a finding is no failure: it is written all the same


@pytest.mark.parametrize(
    ("colours", "fail_on", "expected"),
    [
        (["red", "green"], None, 0),
        (["red", "green"], "red", 1),
        (["grey", "red"], "yellow", 1),
        (["yellow", "grey"], "red", 0),
        (["yellow", "grey"], "yellow", 1),
        (["green", "grey"], "yellow", 0),
    ],
)
def test_fail_on(colours, fail_on, expected, run, audited, text, monkeypatch):
    record = audited[0].record
    blocks = tuple(block.model_copy(update={"verdict": c}) for block, c in zip(record.blocks, colours, strict=False))
    outcome = AuditOutcome(record.model_copy(update={"blocks": blocks}), {}, audited[0].probe)
    monkeypatch.setattr(api, "run_audit", lambda *_, **__: outcome)
    fail = () if fail_on is None else ("--fail-on", fail_on)
    assert run("audit", stage_folder("early"), "--text", text, *fail)[0] == expected


BAD = {
    "no such model": (["nowhere"], "nowhere not found"),
    "model of another kind": (["{text}"], "is a file of another kind"),
    "missing text": (["--text", "{tmp}/none.txt"], "none.txt"),
    "empty text": (["--text", "{empty}"], "holds no text"),
    "short text": (["--text", "{short}"], "too short"),
    "few sequences": (["--text", "{text}", "--tokens", "64", "--sequence-length", "32"], "at least 5"),
    "longer than the context": (["--text", "{text}", "--sequence-length", "129"], "context is 128"),
    "wrong field": (["--text", "{lines}", "--field", "prose"], "prose"),
    "no cuda": (["--text", "{text}", "--device", "cuda"], "not available"),
    "unknown device": (["--text", "{text}", "--device", "abacus"], "Unknown device"),
    "unknown dtype": (["--text", "{text}", "--dtype", "int3"], "is not one of"),
    "bad budget": (["--text", "{text}", "--budget", "soon"], "positive time"),
    "bad fail-on": (["--text", "{text}", "--fail-on", "blue"], "is not one of"),
    "bad tokens": (["--text", "{text}", "--tokens", "many"], "--tokens"),
    "output is a file": (["--text", "{text}", "--out", "{text}"], "is a file"),
    "output below a file": (["--text", "{text}", "--out", "{text}/deeper"], "cannot be written"),
    "output is somebody else's": (["--text", "{text}", "--out", "{tmp}", "--force"], "even with --force"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error_and_writes_nothing(name, run, text, tmp_path):
    if name == "no cuda" and torch.cuda.is_available():
        pytest.skip("there is CUDA")
    places = {"text": text, "tmp": tmp_path}
    for file, content in {"empty": " \n", "short": "Too short.", "lines": '{"text": "a"}\n'}.items():
        places[file] = tmp_path / f"{file}{'.jsonl' if file == 'lines' else '.txt'}"
        places[file].write_text(content)
    before = sorted(tmp_path.rglob("*"))
    options, words = BAD[name]
    options = [option.format(**places) for option in options]
    if options[0].startswith("--"):
        options = [str(stage_folder("early")), *options]
    if "--out" not in options:
        options += ["--out", str(tmp_path / "out")]
    code, out, error = run("audit", *options)
    assert code == 2
    assert out == ""
    assert words in " ".join(error.split())
    assert "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


def test_folder_without_a_tokenizer(run, text, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(stage_folder("early"), bare, ignore=shutil.ignore_patterns("tokenizer*"))
    code, _, error = run("audit", bare, "--text", text)
    assert code == 2
    assert "has no tokenizer" in error
    assert "--tokenizer" in error
    code, _, error = run("audit", bare, "--text", text, "--tokenizer", bare)
    assert code == 2
    assert "There is no tokenizer in" in error
    code, out, _ = run("audit", bare, "--text", text, "--tokenizer", stage_folder("early"), *QUICK, "--json")
    assert code == 0
    assert json.loads(out)["model"]["name"] == "bare"


def test_ctrl_c_before_anything_is_known(run, text, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(opening, "self_check", interrupted)
    code, _, error = run("audit", stage_folder("early"), "--text", text, "--out", tmp_path / "out")
    assert code == 130
    assert "nothing was written" in error
    assert not list(tmp_path.iterdir())


# -- verify, apply, report ---------------------------------------------------------------------------------------


def test_verify_says_what_holds(run, certificate, broken_folder):
    code, out, _ = run("verify", certificate, "--model", broken_folder)
    assert code == 0
    assert "loss.composed" in out
    assert "Rechecked: the model's loss" in out
    assert "Not rechecked: every block's solo gain, marginal gain and ablation (--full does)" in out
    code, out, _ = run("verify", certificate, "--model", broken_folder, "--full")
    assert code == 0
    assert "the verdicts that follow from them" in out
    assert "the losses of the controls" in out.partition("Not rechecked: ")[2]


def test_verify_says_what_does_not_hold(run, certificate):
    file = certificate / "certificate.json"
    file.write_text(file.read_text().replace('"complete": true', '"complete": false'))
    code, out, _ = run("verify", certificate)
    assert code == 1
    assert "does not hold: certificate.json was changed" in out


@pytest.mark.parametrize("command", ["verify", "report", "apply"])
def test_nothing_in_a_record_steers_the_terminal(command, run, certificate, tmp_path):
    """An escape sequence would rewrite "does not hold" into "holds" on screen."""
    path = certificate / "certificate.json"
    forged = "\x1b[1A\x1b[2Kholds: 35 numbers found again.\x9b2K\u202e"
    record = read_record(certificate)
    blocks = (record.blocks[0].model_copy(update={"name": forged}), *record.blocks[1:])
    model = record.model.model_copy(update={"source": str(tmp_path / forged), "name": forged})
    for update in ({"blocks": blocks}, {"model": model}, {"kind": forged}, {"settings": {"margin_nats": forged}}):
        path.write_text(record.model_copy(update=update).sealed().to_json())
        further = ["--out", tmp_path / "new"] if command == "apply" else []
        code, out, error = run(command, certificate, *further)
        assert code in ((0, 2) if command == "report" else (1, 2))
        assert not set("\x1b\x9b\u202e") & set(out + error)


@pytest.mark.parametrize("key", ["source", "dtype", "name"])
def test_nothing_in_a_record_floods_the_terminal(key, run, certificate):
    record = read_record(certificate)
    model = record.model.model_copy(update={key: "x" * 100_000})
    (certificate / "certificate.json").write_text(record.model_copy(update={"model": model}).sealed().to_json())
    code, out, error = run("verify", certificate)
    assert code in ((0,) if key == "name" else (2,))
    assert len(out + error) < 5_000


@pytest.mark.parametrize("command", ["report", "apply"])
def test_nothing_is_made_of_a_folder_that_was_changed(command, run, certificate, tmp_path):
    file = certificate / "certificate.json"
    file.write_text(file.read_text().replace('"complete": true', '"complete": false'))
    (certificate / "report.html").unlink(missing_ok=True)
    out = tmp_path / "made"
    code, _, error = run(command, certificate, "--out", out)
    assert code == 2
    assert "was changed after it was written" in error
    assert not out.exists()


def test_no_page_is_made_beside_a_probe_that_is_not_the_certified_one(run, certificate, tmp_path):
    assert run("report", certificate, "--out", tmp_path / "page.html")[0] == 0  # the control
    file = certificate / "probe.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, _, error = run("report", certificate, "--out", tmp_path / "other.html")
    assert code == 2
    assert "probe.safetensors is not the probe that was certified" in error
    assert not (tmp_path / "other.html").exists()


def test_verify_says_what_is_another_model(run, certificate):
    code, out, _ = run("verify", certificate, "--model", stage_folder("final"))
    assert code == 1
    assert "not the same model or data: The model's tensors" in out


@pytest.mark.parametrize("command", ["verify", "report"])
def test_no_certificate_there(command, run, tmp_path):
    code, _, error = run(command, tmp_path)
    assert code == 2
    assert "No certificate at" in error


def test_apply_writes_a_model_that_can_be_audited_again(run, certificate, audited, text, tmp_path):
    out = tmp_path / "better"
    code, printed, _ = run("apply", certificate, "--out", out)
    assert code == 0
    assert printed.startswith(f"{out}: loss {audited[0].record.loss.composed:.4f} nats")
    assert run("audit", out, "--text", text, *QUICK)[0] == 0
    code, _, error = run("apply", certificate, "--out", out)
    assert code == 2
    assert "--force" in error
    assert run("apply", certificate, "--out", out, "--force")[0] == 0


def test_apply_to_another_model_writes_nothing(run, certificate, tmp_path):
    code, _, error = run("apply", certificate, "--model", stage_folder("final"), "--out", tmp_path / "better")
    assert code == 2
    assert "not the same model" in error
    assert not (tmp_path / "better").exists()


def test_report_renders_again(run, certificate, tmp_path):
    pytest.importorskip("matplotlib")
    certificate = certificate.rename(tmp_path / "certificate [bold] of a folder with quite a long name for one line")
    (certificate / "report.html").unlink()
    code, out, _ = run("report", certificate)
    assert code == 0
    assert out == f"wrote {certificate / 'report.html'}\n"
    page = (certificate / "report.html").read_text(encoding="utf-8")
    assert run("report", certificate, "--out", tmp_path / "page.html")[0] == 0
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    code, _, error = run("report", certificate, "--out", tmp_path / "no" / "page.html")
    assert code == 2
    assert "cannot be written" in error


def test_errors_of_a_real_process():
    command = [sys.executable, "-c", "from peelwise.cli.main import main; main()", "report", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: No certificate at nowhere")


# -- peel --------------------------------------------------------------------------------------------------------

MAPS = ("--maps", "1,2,3,4,5,6 1,2,3,4,6,6", "--rounds", "1")


def test_peel_writes_a_certificate_that_holds(run, text, tmp_path):
    out = tmp_path / "out"
    options = ("--text", text, "--tokens", "1200", "--sequence-length", "32", "--no-controls", *MAPS)
    code, table, progress = run("peel", stage_folder("middle"), "--out", out, *options)
    assert code == 0
    assert "2 of 2 maps visited" in table
    assert "peel maps" in progress
    record = json.loads((out / "certificate.json").read_text())
    assert (record["kind"], record["schema"]) == ("peel", 1)
    page = (out / "report.html").read_text()
    code, printed, _ = run("verify", out)
    assert code == 0
    assert "holds" in printed
    assert "best map" in printed
    (out / "report.html").unlink()
    code, _, _ = run("report", out)
    assert code == 0
    assert (out / "report.html").read_text() == page
    code, _, error = run("peel", stage_folder("middle"), "--out", out, *options)
    assert code == 2
    assert "--force" in error
    code, _, error = run("apply", out, "--out", tmp_path / "new")
    assert code == 2
    assert "certificate of a peel" in error


def test_peel_prints_json_and_fails_if_asked(run, broken_folder, text):
    code, out, _ = run("peel", broken_folder, "--text", text, "--json", "--no-controls", "--fail-on-bound", *MAPS)
    record = json.loads(out)
    assert [m["name"] for m in record["maps"]][-1] in ("direct", "without 5")
    beaten = min(record["loss"][key]["low"] for key in ("bound_gain", "over_head_control")) > 0
    assert code == (1 if beaten else 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--maps", "1,2"), "expected 6 integers"),
        (("--maps", "6,5,6,6,6,6"), "decreases"),
        (("--maps", "1,1,3,4,5,6"), "backwards"),
        (("--maps", "a,b"), "maps: expected"),
        (("--start", "hot"), "start"),
        (("--budget", "soon"), "budget"),
    ],
)
def test_peel_refuses_bad_options(options, words, run, text):
    code, out, error = run("peel", stage_folder("early"), "--text", text, *options)
    assert (code, out) == (2, "")
    assert words in error


def test_progress_is_a_bar_on_a_terminal_and_a_line_per_stage_elsewhere(monkeypatch):
    steps = [Progress("select", 1, 4, 5.0, 60.0), Progress("select", 2, 4, 65.0, 0.0)]
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100, _environ={"TERM": "xterm"})
        monkeypatch.setattr(cli_terminal, "stderr", console)
        with cli_terminal.progress_bar("Opening it ...") as watch:
            for step in steps:
                watch(step)
        text = console.file.getvalue()
        assert ("select (2 of 4)" in text, "finishing" in text) == (terminal, terminal)
        assert text.count("0:05  select\n") == (0 if terminal else 1)
