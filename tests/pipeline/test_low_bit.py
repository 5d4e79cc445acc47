"""Audits of models with low-bit layers: measured on the effective weights, and said to be dense."""

from __future__ import annotations

import pytest

import peelwise
from audits import ONE_ROUND, Snapshot, tiny_probe
from peelwise.errors import CertificateError
from peelwise.nn import quantize_
from peelwise.pipeline.audit import run_audit
from peelwise.pipeline.certificate import merged_model, read_certificate
from zoo import ZOO


def test_a_low_bit_model_is_audited_as_it_computes_and_its_dense_witness_is_not_merged(tmp_path) -> None:
    model = ZOO["plain"]()
    dense = run_audit(model, tiny_probe(), ONE_ROUND).record
    assert not any("low-bit" in note for note in dense.notes)
    swapped = quantize_(model, "ternary")
    before = Snapshot.of(model)
    outcome = run_audit(model, tiny_probe(), ONE_ROUND)
    before.assert_unchanged(model)
    assert outcome.record.loss.current != pytest.approx(dense.loss.current, abs=1e-3)
    assert any(note.startswith(f"{len(swapped)} linear maps hold low-bit codes") for note in outcome.record.notes)
    peelwise.AuditReport(outcome.record, outcome.witness, outcome.probe).save(tmp_path / "out")
    assert peelwise.verify(tmp_path / "out", model).status == "holds"
    with pytest.raises(CertificateError, match="low-bit codes, and this witness is dense"):
        merged_model(read_certificate(tmp_path / "out"), model)
