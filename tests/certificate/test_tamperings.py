"""Whoever seals a forged certificate again with peelwise's own code is found out; docs/threat-model.md counts them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peelwise
from audits import tiny_probe
from peelwise.certificate.audit import read_certificate, verify_certificate
from peelwise.certificate.base import write_certificate
from peelwise.errors import PeelwiseError
from peelwise.evidence.audit import conclusion_of
from peelwise.model.checkpoints import open_model
from peelwise.records.audit import AuditRecord
from peelwise.records.files import PROBE_FILE, RECORD_FILE, WITNESS_FILE, read_record
from tamperings import BYTES, MALFORMED, TAMPERINGS, forged
from zoo import ZOO

PAGE = Path(__file__).parents[2] / "docs" / "threat-model.md"
CASES = [(kind, name) for kind, cases in TAMPERINGS.items() for name in cases]
MOST_SECONDS = 60.0  # far above what it takes: processors are shared


@pytest.fixture(scope="module")
def drawn(audited, broken_folder):
    """The folder of a certificate whose probe says what it was drawn from, and its model."""
    return audited[1], open_model(broken_folder).model


@pytest.fixture(scope="module")
def original(drawn):
    folder, _ = drawn
    content = json.loads((folder / RECORD_FILE).read_text())
    return content, load_file(folder / WITNESS_FILE), load_file(folder / PROBE_FILE)


def why_not(verify) -> str:
    """Return in one line why a certificate does not hold or cannot be read; nothing if it holds."""
    try:
        result = verify()
        reason = "" if result.holds else result.reason
    except PeelwiseError as error:
        reason = str(error)
    assert "\n" not in reason
    return reason


def test_the_untouched_one_holds_sealed_again(original, drawn, tmp_path):
    """The control of all others."""
    folder = forged(AuditRecord, original, lambda c, w, p: None, tmp_path / "same")
    result = verify_certificate(folder, drawn[1], full=True)
    assert result.status == "holds", result.reason
    assert result.split.startswith("rechecked: ")
    colours = [block.verdict for block in read_record(folder).blocks]
    assert "red" in colours[2:5]  # or taking red evidence away would take nothing


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_tampering_is_found(kind, name, original, drawn, tmp_path):
    folder = forged(AuditRecord, original, TAMPERINGS[kind][name], tmp_path / "forged")
    content = json.loads((folder / RECORD_FILE).read_text())
    assert content != json.loads((drawn[0] / RECORD_FILE).read_text())  # or there would be nothing to find
    reason = why_not(lambda: verify_certificate(folder, drawn[1]))
    assert reason, f"{kind}: {name}"
    assert "changed after it was written" not in reason


@pytest.mark.parametrize(("file", "fraction"), BYTES)
def test_a_flipped_byte_is_found(file, fraction, drawn, tmp_path):
    folder = shutil.copytree(drawn[0], tmp_path / "flipped")
    path = folder / f"{file}.safetensors"
    content = bytearray(path.read_bytes())
    content[int(fraction * len(content))] ^= 4
    path.write_bytes(content)
    assert why_not(lambda: verify_certificate(folder, drawn[1]))


@pytest.mark.parametrize("name", MALFORMED)
def test_what_cannot_be_read_is_one_line_and_soon(name, original, drawn, tmp_path):
    folder = forged(AuditRecord, original, MALFORMED[name], tmp_path / "malformed")
    began = time.monotonic()
    with pytest.raises(PeelwiseError) as caught:
        peelwise.verify(folder, drawn[1])
    assert time.monotonic() - began < MOST_SECONDS
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("file", [RECORD_FILE, WITNESS_FILE, PROBE_FILE])
@pytest.mark.parametrize("instead", ["pipe", "/dev/zero", "folder", "sparse"])
def test_special_files_are_refused_at_once(file, instead, drawn, tmp_path):
    folder = shutil.copytree(drawn[0], tmp_path / "special")
    path = folder / file
    path.unlink()
    if instead == "pipe":
        os.mkfifo(path)
    elif instead == "folder":
        path.mkdir()
    elif instead == "sparse":
        with path.open("wb") as stream:
            stream.truncate(20 * 2**30)
    else:
        path.symlink_to(instead)
    began = time.monotonic()
    assert file in why_not(lambda: peelwise.verify(folder, drawn[1]))
    assert time.monotonic() - began < MOST_SECONDS


def test_a_sparse_witness_that_the_record_admits_to_is_refused(drawn, tmp_path):
    """Its header is whole, so its size is what is wrong."""
    folder = shutil.copytree(drawn[0], tmp_path / "sparse")
    with (folder / WITNESS_FILE).open("r+b") as stream:
        stream.truncate(20 * 2**30)
    began = time.monotonic()
    with pytest.raises(PeelwiseError, match="plausible"):
        read_certificate(folder, drawn[1])
    assert time.monotonic() - began < MOST_SECONDS


@pytest.mark.parametrize("file", [WITNESS_FILE, PROBE_FILE])
def test_a_header_of_more_tensors_than_any_model_has_is_refused_soon(file, drawn, original, tmp_path):
    """Opening 600,000 tensors of no number took a minute."""
    folder = forged(AuditRecord, original, lambda c, w, p: None, tmp_path / "many")
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"composed/{i}": empty for i in range(130_000)}).encode()
    content = len(header).to_bytes(8, "little") + header
    (folder / file).write_bytes(content)
    record = read_record(folder)
    if file == WITNESS_FILE:
        told = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        record = record.model_copy(update={"witness": record.witness.model_copy(update=told)}).sealed()
        (folder / RECORD_FILE).write_text(record.to_json())
    began = time.monotonic()
    assert "entries" in why_not(lambda: peelwise.verify(folder, drawn[1]))
    assert time.monotonic() - began < 3


def test_a_gain_within_the_tolerance_is_no_evidence(tmp_path):
    """A witness of zeros, certified as gains that half precision could be off by, at the least margin there is."""
    model = ZOO["llama"]().bfloat16()
    settings = peelwise.AuditSettings(joint_rounds=0, solo_rounds=1, controls=False, margin=5e-4)
    report = peelwise.audit(model, tiny_probe(in_distribution=True), settings)
    gain = dict.fromkeys(("mean", "low", "high"), 0.0049) | {"standard_error": 0.0, "skewness": 0.0}
    blocks = []
    for block in report.record.blocks:
        interval = block.recoverable_nats.model_copy(update=gain | {"method": "student-t"})
        red = {"verdict": "red", "reason_code": "above-margin", "tokens_needed": None}
        blocks.append(block.model_copy(update=red | {"recoverable_nats": interval}))
    record = report.record.model_copy(update={"blocks": tuple(blocks)})
    record = record.model_copy(update={"conclusion": conclusion_of(record)})
    zeros = {name: torch.zeros_like(tensor) for name, tensor in report.witness.items()}
    write_certificate(tmp_path / "zeros", record, zeros, report.probe)
    result = verify_certificate(tmp_path / "zeros", model, full=True)
    assert all(check.holds for check in result.checks)  # every number is within the tolerance, and yet
    assert not result.holds
    assert "red was certified" in result.reason


def test_a_certificate_that_pretends_to_be_of_old_is_said_not_to_be_rechecked(original, drawn, tmp_path):
    """Then sequences may be chosen; what is left is that nothing claims otherwise, and `--text`."""

    def chosen(content, witness, probe):
        content["probe"].update(dict.fromkeys(("pool_sequences", "pool_sha256", "pool_left_out", "documents")))
        for part in ("fit", "select", "report"):
            probe.pop(f"{part}.documents", None)

    whole = verify_certificate(forged(AuditRecord, original, lambda c, w, p: None, tmp_path / "whole"), drawn[1])
    found = verify_certificate(forged(AuditRecord, original, chosen, tmp_path / "of-old"), drawn[1])
    assert found.split.startswith("not rechecked")
    assert any("assigned to the parts" in what for what in found.not_rechecked)
    assert not any("assigned to the parts" in what for what in whole.not_rechecked)


def test_the_page_counts_what_is_tried():
    page = PAGE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+?) \| (\d+) \|", page, flags=re.MULTILINE))
    expected = {kind: len(cases) for kind, cases in TAMPERINGS.items()}
    expected |= {"a byte flipped": len(BYTES), "malformed, see the tests": len(MALFORMED), "a special file": 13}
    assert {kind: int(rows[kind]) for kind in expected} == expected
    assert sum(expected.values()) >= 150
    assert int(rows["all"]) == sum(expected.values())
