"""A witness made again from fit and select: an honest one comes out bit for bit, one fitted to report does not."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch

import peelwise
from audits import ONE_ROUND, part_of, tiny_probe
from peelwise.certificate.audit import read_certificate
from peelwise.certificate.base import write_certificate
from peelwise.engine.baselines import probe_unigram
from peelwise.errors import CertificateError
from zoo import ZOO

QUIET = dataclasses.replace(ONE_ROUND, controls=False)


def test_an_honest_witness_comes_out_again_bit_for_bit(audited, broken_folder):
    result = peelwise.verify(audited[1], broken_folder, replay=True)
    assert result.holds, result.reason
    again = result.replay
    assert (again.tensors, again.differing, again.left_out) == (len(audited[0].witness), 0, ())
    assert "the witness, made again from fit and select" in result.rechecked
    assert not any("fitted on report" in said for said in result.not_rechecked)


@pytest.mark.nightly
def test_on_another_number_of_threads_it_comes_out_with_the_same_gains(audited, broken_folder):
    before = torch.get_num_threads()
    torch.set_num_threads(3 - min(before, 2))
    try:
        result = peelwise.verify(audited[1], broken_folder, replay=True)
    finally:
        torch.set_num_threads(before)
    assert result.holds, result.reason


def test_a_witness_fitted_to_report_does_not_come_out_again(small_gpt, held_out_probe, tmp_path):
    """Nothing else in the folder betrays it."""
    model, _ = small_gpt("final")
    probe = held_out_probe
    cheat = peelwise.audit(model, replace(probe, fit=probe.report, select=probe.report), QUIET)
    loss = cheat.record.loss.model_copy(update={"unigram": probe_unigram(probe, model)})  # anybody can count
    said = cheat.record.model_copy(update={"probe": probe.record(), "loss": loss})
    write_certificate(tmp_path / "cheat", said, cheat.witness, probe)
    assert peelwise.verify(tmp_path / "cheat", model, full=True).holds
    result = peelwise.verify(tmp_path / "cheat", model, replay=True)
    assert result.status == "does not hold"
    assert "Made again from fit and select" in result.reason
    assert "loss.composed_gain" in result.reason
    assert result.replay.differing > 0


@pytest.fixture
def held_out_probe(small_gpt):
    from small_gpt.text import held_out_documents

    return peelwise.Probe.from_text(held_out_documents(), small_gpt("final")[1], tokens=3_200, in_distribution=True)


@pytest.fixture(scope="module")
def tiny():
    model = ZOO["llama"]()
    return model, peelwise.audit(model, tiny_probe(), QUIET)


def rewritten(report, folder, *, witness=None, **record):
    write_certificate(folder, report.record.model_copy(update=record), witness or report.witness, report.probe)
    return folder


def test_other_bits_with_the_same_gains_hold_and_are_said(tiny, tmp_path):
    """As on a machine that adds in another order."""
    model, report = tiny
    witness = {name: tensor.clone() for name, tensor in report.witness.items()}
    name = next(iter(witness))
    witness[name].view(torch.int16)[0, 0] ^= 1
    versions = report.record.versions | {"torch": "9.9"}
    result = peelwise.verify(
        rewritten(report, tmp_path / "one", witness=witness, versions=versions), model, replay=True
    )
    assert result.holds, result.reason
    assert result.replay.differing == 1
    assert "it was made with torch 9.9" in result.replay.reason


def test_an_audit_that_ended_early_is_made_again_as_far_as_its_joint_rounds(tiny, tmp_path):
    model, report = tiny
    result = peelwise.verify(rewritten(report, tmp_path / "early", complete=False), model, replay=True)
    assert result.holds, result.reason
    assert result.replay.left_out == ("the blocks by themselves (the audit ended early)",)
    assert 0 < result.replay.tensors < len(report.witness)


def test_what_was_frozen_is_not_asked_about_again(tmp_path):
    """A model that is merely open says of no layer that it was frozen."""
    model = ZOO["llama"]()
    model.model.layers[0].requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(False)
    report = peelwise.audit(model, tiny_probe(), QUIET)
    names = {name.partition("/")[2] for name in report.witness}
    assert not any(".layers.0." in name or ".layers.1.mlp" in name for name in names)
    assert any(".layers.1." in name for name in names)
    opened = ZOO["llama"]()
    result = peelwise.verify(report.save(tmp_path / "frozen"), opened, replay=True)
    assert result.holds, result.reason
    assert result.replay.differing == 0
    assert all(parameter.requires_grad for parameter in opened.parameters())


def test_one_that_was_cut_before_any_round_cannot_be(tiny, tmp_path):
    model, _ = tiny
    report = peelwise.audit(model, tiny_probe(), dataclasses.replace(QUIET, joint_rounds=0))
    with pytest.raises(CertificateError, match="cannot be made again"):
        peelwise.verify(rewritten(report, tmp_path / "cut", complete=False), model, replay=True)


def test_a_peel_is_made_again_and_a_forged_stack_is_found(tmp_path):
    model = ZOO["llama"]()
    settings = peelwise.PeelSettings(maps=[[2, 2, 3], [1, 2, 3]], rounds=1, controls=False)
    report = peelwise.peel(model, tiny_probe(), settings)
    folder = report.save(tmp_path / "honest")
    result = peelwise.verify(folder, model, replay=True)
    assert result.holds, result.reason
    assert result.replay.differing == 0
    assert result.replay.tensors == len(report.witness) > 0
    cut = report.record.model_copy(update={"complete": False})
    write_certificate(tmp_path / "cut", cut, report.witness, report.probe)
    with pytest.raises(CertificateError, match="The budget decided"):
        peelwise.verify(tmp_path / "cut", model, replay=True)
    probe = tiny_probe()
    cheat = peelwise.peel(model, replace(probe, fit=probe.report, select=probe.report), settings)
    said = cheat.record.model_copy(update={"probe": probe.record()})
    write_certificate(tmp_path / "cheat", said, cheat.witness, probe)
    assert peelwise.verify(tmp_path / "cheat", model).holds
    assert peelwise.verify(tmp_path / "cheat", model, replay=True).status == "does not hold"


def test_the_command_says_it(run, tiny, tmp_path):
    model, _ = tiny
    model.save_pretrained(tmp_path / "model")
    report = peelwise.audit(tmp_path / "model", part_of(tiny_probe(), fit=8, select=3, report=8), QUIET)
    folder = report.save(tmp_path / "certificate")
    code, out, _ = run("verify", folder, "--model", tmp_path / "model", "--replay")
    assert code == 0
    assert f"Made again: All {len(read_certificate(folder).witness)} tensors come out again, bit for bit." in out
