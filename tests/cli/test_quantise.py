"""``peelwise quantise`` from a folder and from a GGUF file, to the end."""

from __future__ import annotations

import json

import pytest

from gguf_files import llama_of_whole_blocks, write_llama_gguf

VOCABULARY = [chr(33 + n) for n in range(93)] + ['!"', "Ġ", "Ċ", "e>"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "notes.txt"
    lines = (f"line {n}: {n * n} is the square of {n}, and {n**3} its cube." for n in range(400))
    file.write_text("\n\n".join(lines))
    return file


def test_a_gguf_file_becomes_another(run, text, tmp_path):
    source, out = tmp_path / "tiny.gguf", tmp_path / "out"
    write_llama_gguf(llama_of_whole_blocks(), source, "Q8_0", vocabulary=VOCABULARY)
    options = ("--text", text, "--tokens", 1500, "--sequence-length", 32, "--max-sweeps", 1, "--out", out)
    code, said, errors = run("quantise", source, "--format", "int4:group=32,minimum", "--to", "gguf", *options)
    assert code == 0, errors
    assert "rounded to nearest" in said
    assert f"Written to {out}." in said
    record = json.loads((out / "quantise.json").read_text())
    assert record["loss"]["quantised"] > 0
    code, said, errors = run(
        "quantcheck", out / "model.gguf", "--against", source, "--text", text, "--tokens", 1500, "--sequence-length", 32
    )
    assert code == 0, errors
    assert "int4:group=32,minimum" in said  # read from the file that was written

    code, _, errors = run("quantise", source, "--format", "int4:group=32", *options)
    assert code == 2
    assert "exists and is not empty" in errors


def test_errors_are_one_line_and_come_before_the_work(run, text, tmp_path):
    source = tmp_path / "tiny.gguf"
    write_llama_gguf(llama_of_whole_blocks(), source, "Q8_0", vocabulary=VOCABULARY)
    for arguments, words in (
        (("--format", "int99"), "int99"),
        (("--format", "int3", "--to", "gguf"), "GGUF has no blocks for int3"),
        (("--skip", "nowhere"), "nowhere"),
        (("--format", "int4:group=48"), "does not divide the 64 inputs"),
    ):
        code, _, errors = run("quantise", source, "--text", text, "--tokens", 1500, "--sequence-length", 32, *arguments)
        assert code == 2
        assert words in errors
        assert "Traceback" not in errors


def test_json_is_the_record(run, text, tmp_path):
    source = tmp_path / "tiny.gguf"
    write_llama_gguf(llama_of_whole_blocks(), source, "Q8_0", vocabulary=VOCABULARY)
    code, said, errors = run(
        "quantise", source, "--format", "int3", "--text", text, "--tokens", 1500, "--sequence-length", 32, "--json",
        "--max-sweeps", 0, "--no-asymmetric", "--no-curvature",
    )  # fmt: skip
    assert code == 0, errors
    record = json.loads(said)
    assert record["kind"] == "quantise"
    assert {step for layer in record["layers"] for step in layer["steps"]} == {"rounded", "fed-back"}
