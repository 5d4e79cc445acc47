"""``peelwise compare`` on the small GPT: two checkpoints, a broken one, a whole run; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages import CHECKPOINTS, stage_folder

QUICK = ("--tokens", 2_400, "--layers-of", 1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from small_gpt.text import training_documents

    path = tmp_path_factory.mktemp("text") / "training.txt"
    path.write_text("\n\n".join(document[:1_500] for document in training_documents()[::12]), encoding="utf-8")
    return path


def test_a_broken_block_is_named_saved_and_fails_on_demand(run, broken_folder, text, tmp_path) -> None:
    out = tmp_path / "changes"
    tokenizer = CHECKPOINTS / "tokenizer"
    from small_gpt.text import training_documents

    arguments = ("compare", stage_folder("final"), broken_folder, "--text", text, "--tokenizer", tokenizer, *QUICK)
    code, shown, _ = run(*arguments, "--out", out, "--fail-on", "hurt")
    assert code == 1
    assert "Putting back block 3 repairs" in " ".join(shown.split())
    assert "sign flipped" in shown
    record = json.loads((out / "certificate.json").read_text())
    assert record["kind"] == "compare"
    assert record["conclusion"]["hurt"] == [3]
    assert record["blocks"][3]["kind_of_change"] == "sign"
    assert set(record["blocks"][3]["repairs_nats"]) >= {"mean", "low", "high"}
    assert record["first_difference"]["block"] == 3
    assert "<svg" in (out / "report.html").read_text()
    code, _, err = run(*arguments, "--out", out)
    assert code == 2
    assert "not empty" in " ".join(err.split())
    code, shown, _ = run("verify", out)
    assert (code, shown.count("differs")) == (0, 0)
    assert "holds" in shown
    own = tmp_path / "own.txt"
    own.write_text("\n\n".join(document[1_500:3_000] for document in training_documents()[::12]), encoding="utf-8")
    given = ("--old", stage_folder("final"), "--new", broken_folder)
    code, shown, err = run("verify", out, *given, "--text", own, "--tokens", 2_000)
    assert code == 0, shown + err
    assert "hurt" in shown
    assert "Your text" in shown
    own.write_text(text.read_text()[::-1][:60_000])  # control: nonsense, which the broken block costs nothing on
    code, shown, _ = run("verify", out, *given, "--text", own, "--tokens", 2_000)
    assert code == 1
    assert "On your text all that hurt repairs" in shown
    code, shown, err = run("apply", out, "--out", tmp_path / "mended", *given)
    assert code == 0, err
    assert f"loss {record['mended']['loss']:.4f}" in shown
    assert record["mended"]["blocks"] == [3]
    code, shown, _ = run("verify", out, "--old", broken_folder, "--new", stage_folder("final"))  # exchanged
    assert code == 1
    assert "not the same model" in shown
    (out / "report.html").unlink()
    code, shown, _ = run("report", out)
    assert code == 0
    assert "<svg" in (out / "report.html").read_text()
    code, shown, _ = run(  # control: the other way round nothing hurts
        "compare", broken_folder, stage_folder("final"), *arguments[3:], "--json", "--no-path", "--fail-on", "hurt"
    )
    assert code == 0
    assert json.loads(shown)["conclusion"]["helped"] == [3]


@pytest.mark.nightly
def test_the_folder_of_a_run_is_a_table_over_time(run, text) -> None:
    arguments = ("compare", CHECKPOINTS, "--text", text, "--tokenizer", CHECKPOINTS / "tokenizer", *QUICK, "--no-path")
    code, shown, _ = run(*arguments, "--json")
    assert code == 0
    pairs = json.loads(shown)["pairs"]
    names = [(one["old"]["name"], one["model"]["name"]) for one in pairs]
    assert names == [("step-00100", "step-00600"), ("step-00600", "step-02400")]
    assert all(one["conclusion"]["case"] == "better" for one in pairs)


def test_bad_input_ends_in_one_line(run, text, tmp_path) -> None:
    final = stage_folder("final")
    code, _, err = run("compare", tmp_path)
    assert code == 2
    assert "holds 0 checkpoints" in " ".join(err.split())
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    code, _, err = run("compare", final, final, "--text", short, "--tokenizer", CHECKPOINTS / "tokenizer")
    assert code == 2
    assert err.count("error:") == 1
