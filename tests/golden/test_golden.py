"""Certificates and a run history of an earlier version are opened, rechecked and shown, for ever."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path

import pytest

import peelwise
from damage import sign_flip
from peelwise.records.files import read_any_record
from peelwise.store import RunReader
from stages import CHECKPOINTS

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
REPOSITORY = CHECKPOINTS.parents[2]
RED = [2, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a copy of a certificate's folder: nothing here may change the originals."""

    def copied(name: str) -> Path:
        target = shutil.copytree(HERE / name, tmp_path_factory.mktemp(name) / name)
        for packed in target.glob("*.xz"):
            packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        return target

    return copied


@pytest.fixture
def models(small_gpt):
    return {
        "audit": lambda: sign_flip(small_gpt("final")[0], 3),
        "audit-ternary": lambda: REPOSITORY / "examples/small_gpt/low_bit/ternary-tuned",
        "peel": lambda: CHECKPOINTS / "step-00600",
    }


@pytest.mark.parametrize("name", ["audit", "audit-ternary", "peel"])
def test_a_certificate_is_rechecked(name, folder, models):
    result = peelwise.verify(folder(name), models[name](), full=True)
    assert result.status == "holds", result.reason
    assert len(result.checks) > 3


@pytest.mark.parametrize("name", ["audit", "audit-ternary", "peel"])
def test_a_changed_number_is_still_caught(name, folder, models):
    """The control: the same certificate with one verdict or loss rewritten does not hold."""
    path = folder(name)
    record = json.loads((path / "certificate.json").read_text())
    record["loss"]["current" if "current" in record["loss"] else "model"] += 0.1
    (path / "certificate.json").write_text(json.dumps(record))
    assert peelwise.verify(path, models[name](), full=True).status == "does not hold"


@pytest.mark.parametrize("name", ["audit", "audit-ternary", "peel"])
def test_a_certificate_is_shown(name, folder, run):
    path = folder(name)
    code, _, error = run("report", path)
    assert (code, error) == (0, "")
    page = (path / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert f"{read_any_record(path).loss.current:.4f}" in page


def test_the_red_blocks_are_named(folder, run):
    path = folder("audit")
    record = read_any_record(path)
    assert [block.index for block in record.blocks if block.verdict == "red"] == RED
    run("report", path)
    page = (path / "report.html").read_text(encoding="utf-8")
    assert "2 of 6 blocks certified under-optimised" in page
    assert "better without block 3" in page


def test_a_run_history_is_read_shown_and_exported(run, tmp_path):
    path = tmp_path / "run.db"
    shutil.copy(HERE / "run.db", path)
    with RunReader(path) as reader:
        (one,) = reader.runs()
        assert (one.info.name, len(one.info.blocks)) == ("golden", 6)
    code, out, _ = run("watch", path, "--once")
    assert code == 0
    assert "golden" in out
    assert "frozen" in out
    code, _, _ = run("export", path, "--to", "jsonl", "--out", tmp_path / "exported")
    assert code == 0
    steps = (tmp_path / "exported" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == list(range(40))


def test_a_run_history_goes_on(tmp_path):
    """An older file takes a new run, and keeps the old one."""
    from runs import write_run

    path = tmp_path / "run.db"
    shutil.copy(HERE / "run.db", path)
    write_run(path, name="later")
    with RunReader(path) as reader:
        assert [one.info.name for one in reader.runs()] == ["golden", "later"]
