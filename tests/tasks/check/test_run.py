"""Whole checks of a trained model, healthy and with one block that subtracts what it should add."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peelwise
from damage import sign_flip
from peelwise.api.certificate import apply, verify
from peelwise.certificate.base import write_certificate
from peelwise.certificate.check import factor_tensors
from peelwise.errors import CertificateError, OptionError
from peelwise.model.fingerprint import fingerprint
from peelwise.records.check import CheckRecord
from peelwise.records.files import RECORD_FILE, WITNESS_FILE
from peelwise.show.check.words import witness_words
from peelwise.tasks.check.run import run_check
from peelwise.tasks.check.settings import CheckSettings

BLOCK = 3


@pytest.fixture(scope="module")
def probe(training_probe: Any) -> peelwise.Probe:
    rows = [row for part in ("fit", "select", "report") for row in getattr(training_probe, part).rows()]
    return peelwise.Probe.from_tokens(rows, tokens=24 * 128, in_distribution=True, source="training text")


@pytest.fixture(scope="module")
def healthy(stored_stage: Callable[[str], Any], probe: peelwise.Probe) -> CheckRecord:
    return run_check(stored_stage("final")[0], probe, CheckSettings())


@pytest.fixture(scope="module")
def broken(broken_folder: Path, probe: peelwise.Probe) -> tuple[Any, CheckRecord]:
    from peelwise.model.checkpoints import open_model

    model = open_model(broken_folder, with_tokenizer=False).model
    before = fingerprint(model)
    record = run_check(model, probe, CheckSettings(), source=str(broken_folder))
    assert fingerprint(model) == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    return model, record


@pytest.fixture(scope="module")
def certificate(
    broken: tuple[Any, CheckRecord], probe: peelwise.Probe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder: Path = tmp_path_factory.mktemp("checked") / "certificate"
    write_certificate(folder, broken[1], factor_tensors(broken[1]), probe)
    return folder


def test_the_block_at_fault_has_the_highest_score_and_is_named(broken: tuple[Any, CheckRecord]) -> None:
    record = broken[1]
    scores = [block.score or 0.0 for block in record.blocks]
    assert max(range(6), key=lambda i: scores[i]) == BLOCK
    assert record.unlike is not None
    assert [each.block for each in record.unlike][:1] == [BLOCK]
    assert record.unlike[0].reasons[0].signal in {"gain_t", "gain_slope"}
    ablation = record.blocks[BLOCK].ablation
    assert ablation is not None
    assert ablation.mean < 0  # the model is better without it


def test_its_gain_witness_turns_the_sign_back(broken: tuple[Any, CheckRecord], healthy: CheckRecord) -> None:
    record = broken[1]
    best = record.gain_witnesses[0]
    assert best.block == BLOCK
    assert best.factor < 0
    assert best.gain.low > record.margin_nats
    # What leads into a branch and what comes out of it have the same factor: which of two equals is kept is rounding.
    assert any(w.composed and w.gain.mean == pytest.approx(best.gain.mean, rel=0.02) for w in record.gain_witnesses)
    assert record.loss is not None
    assert record.composed_loss is not None
    assert healthy.loss is not None
    assert record.composed_loss < healthy.loss + 0.6 * (record.loss - healthy.loss)


def test_one_head_that_is_too_large_has_a_witness_of_its_own(
    stored_stage: Callable[[str], Any], probe: peelwise.Probe, tmp_path: Path
) -> None:
    """What its columns of the last layer read is multiplied by 8, and a factor near an eighth puts it back."""
    model = copy.deepcopy(stored_stage("final")[0])
    attention = model.model.layers[3].self_attn
    size = attention.head_dim
    with torch.no_grad():
        attention.o_proj.weight[:, 2 * size : 3 * size] *= 8
    record = run_check(model, probe, CheckSettings())
    assert record.unlike[0].block == 3
    found = next(witness for witness in record.gain_witnesses if witness.head is not None and witness.block == 3)
    assert (found.head, found.head_dim) == (2, size)
    assert found.factor == pytest.approx(1 / 8, abs=0.1)
    assert found == record.gain_witnesses[0]  # no other factor gains more
    assert found.composed
    assert found.gain.low > record.margin_nats
    assert "head 2 of attention" in witness_words(found)
    write_certificate(tmp_path / "head", record, factor_tensors(record), probe)
    assert verify(tmp_path / "head", model).holds


def test_in_the_healthy_model_nothing_is_named(healthy: CheckRecord) -> None:
    assert healthy.unlike == ()
    assert healthy.gain_witnesses == ()
    assert healthy.composed_loss is None


def test_the_certificate_holds_and_any_change_of_it_does_not(
    certificate: Path, broken: tuple[Any, CheckRecord]
) -> None:
    found = verify(certificate, broken[0])
    assert found.status == "losses hold, verdicts not rechecked", found.reason
    assert len(found.checks) > 5
    text = (certificate / RECORD_FILE).read_text()
    record = CheckRecord.model_validate_json(text)
    worst = record.gain_witnesses[0]
    forged = [
        record.model_copy(update={"loss": (record.loss or 0) - 0.1}),
        record.model_copy(update={"composed_loss": (record.composed_loss or 0) - 0.1}),
        record.model_copy(update={"threshold": 1e9}),
        record.model_copy(update={"gain_witnesses": ()}),
        record.model_copy(
            update={"gain_witnesses": (worst.model_copy(update={"factor": 1.0}), *record.gain_witnesses[1:])}
        ),
        record.model_copy(
            update={
                "gain_witnesses": (
                    worst.model_copy(update={"gain": worst.gain.model_copy(update={"mean": 5.0})}),
                    *record.gain_witnesses[1:],
                )
            }
        ),
    ]
    try:
        for each in forged:
            (certificate / RECORD_FILE).write_text(each.sealed().to_json())
            assert verify(certificate, broken[0]).status == "does not hold"
    finally:
        (certificate / RECORD_FILE).write_text(text)


def test_a_changed_factor_in_the_witness_file_is_found(certificate: Path, broken: tuple[Any, CheckRecord]) -> None:
    whole = (certificate / WITNESS_FILE).read_bytes()
    tensors = load_file(certificate / WITNESS_FILE)
    save_file({name: value + 1 for name, value in tensors.items()}, certificate / WITNESS_FILE)
    try:
        assert not verify(certificate, broken[0]).holds
    finally:
        (certificate / WITNESS_FILE).write_bytes(whole)


def test_another_model_is_not_the_one_that_was_checked(certificate: Path, stored_stage: Callable[[str], Any]) -> None:
    assert verify(certificate, stored_stage("final")[0]).status == "not the same model or data"


def test_factors_are_merged_into_a_model_with_the_certified_loss(
    certificate: Path, broken_folder: Path, broken: tuple[Any, CheckRecord], tmp_path: Path
) -> None:
    loss = apply(certificate, broken_folder, tmp_path / "better")
    assert loss == pytest.approx(broken[1].composed_loss, abs=3e-4)


def test_factors_hold_on_text_that_was_never_used(
    certificate: Path, broken_folder: Path, held_out_windows: Any, tmp_path: Path
) -> None:
    from small_gpt.text import held_out_documents

    mine = tmp_path / "mine.txt"
    mine.write_text("\n\n".join(held_out_documents()[:12]))
    found = verify(certificate, broken_folder, text=mine, tokens=3_000)
    assert found.holds, found.reason
    assert found.own is not None
    assert found.own.found is not None
    assert found.own.found.low > found.own.margin


def test_without_text_there_are_signals_of_weights_alone(stored_stage: Callable[[str], Any], tmp_path: Path) -> None:
    record = run_check(stored_stage("final")[0], None, CheckSettings())
    assert {note.code for note in record.notes} == {"no-text"}  # type: ignore[union-attr]
    assert record.loss is None
    names = {name.partition(".")[0] for name in record.blocks[0].signals}
    assert "weight_rms" in names
    assert "gain_slope" not in names
    write_certificate(tmp_path / "c", record, {}, None)
    assert json.loads((tmp_path / "c" / RECORD_FILE).read_text())["probe"] is None
    with pytest.raises(CertificateError, match="without text"):
        verify(tmp_path / "c", stored_stage("final")[0])
    found = verify(tmp_path / "c", stored_stage("final")[0], full=True)
    assert found.status == "holds", found.reason
    assert len(found.checks) == 6  # a score for each block
    other = verify(tmp_path / "c", stored_stage("middle")[0], full=True)
    assert other.status == "not the same model or data"


def test_a_model_of_few_blocks_has_raw_signals_and_no_score(probe: peelwise.Probe) -> None:
    from zoo import ZOO

    record = run_check(next(iter(ZOO.values()))(), None, CheckSettings())
    assert record.unlike is None
    assert all(block.score is None and block.signals for block in record.blocks)
    assert "few-blocks" in {note.code for note in record.notes}  # type: ignore[union-attr]


def test_a_model_that_cannot_be_differentiated_still_has_its_other_signals(
    stored_stage: Callable[[str], Any], probe: peelwise.Probe
) -> None:
    model = sign_flip(stored_stage("final")[0], BLOCK)
    layer = model.model.layers[2].mlp
    own = layer.forward
    layer.forward = torch.no_grad()(own)  # as kernels for packed weights are
    record = run_check(model, probe, CheckSettings())
    assert "no-gradients" in {note.code for note in record.notes}  # type: ignore[union-attr]
    names = {name.partition(".")[0] for name in record.blocks[0].signals}
    assert "update_ratio" in names
    assert "gain_slope" not in names


def test_only_the_signals_that_were_asked_for(stored_stage: Callable[[str], Any], probe: peelwise.Probe) -> None:
    record = run_check(stored_stage("final")[0], probe, CheckSettings(signals=("gain_slope", "weight_rms")))
    assert {name.partition(".")[0] for block in record.blocks for name in block.signals} == {"gain_slope", "weight_rms"}
    weights = run_check(stored_stage("final")[0], probe, CheckSettings(signals=("weight_rms",), most_witnesses=0))
    assert weights.cost.forward_equivalents < record.cost.forward_equivalents - 1.5  # no pass was made
    with pytest.raises(OptionError, match="no signal 'nonsense'"):
        CheckSettings(signals=("nonsense",))
