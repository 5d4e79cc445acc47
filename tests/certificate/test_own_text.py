"""A certificate on the text of whoever checks it: an honest witness gains there, one fitted to its report does not."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

import peelwise
from audits import slow_losses
from peelwise.certificate.audit import merged_model, read_certificate
from peelwise.certificate.base import OwnBlock, write_certificate
from peelwise.certificate.own_text import Text, cut_like, not_confirmed
from peelwise.engine.baselines import probe_unigram
from peelwise.errors import ModelError, OptionError, ProbeError
from peelwise.evidence.audit import conclusion_of, verdicts_of
from peelwise.evidence.intervals import Paired
from peelwise.model.checkpoints import open_model


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Text that the small GPT never saw, a document per line."""
    from small_gpt.text import held_out_documents

    file = tmp_path_factory.mktemp("mine") / "mine.jsonl"
    file.write_text("\n".join(json.dumps({"text": d}) for d in held_out_documents()), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def found(audited, broken_folder, mine):
    return peelwise.verify(audited[1], broken_folder, text=mine, tokens=1_600)


def test_an_honest_witness_gains_on_other_text(found, audited):
    own, record = found.own, audited[0].record
    assert found.status == "holds", found.reason
    assert own.certified == record.loss.composed_gain
    assert own.found.low > own.margin > 0
    assert 1_000 < own.tokens <= 1_600
    assert own.overlapping == 0
    assert [block.name for block in own.blocks] == [block.name for block in record.blocks]
    broken = own.blocks[3]  # subtracts what it should add
    assert broken.gains[1].low > own.margin
    assert broken.found in ("red", "yellow")


def test_the_gain_is_that_of_the_merged_model(found, audited, broken_folder, mine):
    """Slow and obvious: the loss of the model with the witness written into it, on the same sequences."""
    certificate, opened = read_certificate(audited[1]), open_model(broken_folder)
    documents = [json.loads(line)["text"] for line in mine.read_text(encoding="utf-8").splitlines()]
    text = Text(documents, opened.tokenizer, 1_600, "mine")
    rows = cut_like(text, certificate.probe, opened.model).split.rows()
    before, after = (
        float(slow_losses(model, rows).sum()) / found.own.tokens
        for model in (opened.model, merged_model(certificate, opened.model))
    )
    assert found.own.loss == pytest.approx(before, abs=1e-5)
    assert found.own.found.mean == pytest.approx(before - after, abs=1e-5)


def test_the_certificates_own_text_is_left_out(audited, broken_folder, mine, tmp_path):
    tokenizer = open_model(broken_folder).tokenizer
    theirs = [tokenizer.decode(row) for row in audited[0].probe.report.rows()]
    both = tmp_path / "both.jsonl"
    lines = [json.dumps({"text": text}) for text in theirs]
    both.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ProbeError, match="left out that the certificate was made on"):
        peelwise.verify(audited[1], broken_folder, text=both)
    both.write_text("\n".join([*lines, *mine.read_text(encoding="utf-8").splitlines()[:12]]), encoding="utf-8")
    own = peelwise.verify(audited[1], broken_folder, text=both, tokens=20_000).own
    assert own.overlapping > 0.5 * len(theirs)


def test_tokens_of_no_text_are_refused(audited, broken_folder):
    with pytest.raises(OptionError, match="no text was given"):
        peelwise.verify(audited[1], broken_folder, tokens=1_600)


def test_a_witness_fitted_to_the_report_part_is_found_by_other_text_alone(mine, small_gpt, tmp_path):
    """Fitted, selected and reported on the same sequences, then the parts are named as if they were apart."""
    model, tokenizer = small_gpt("final")
    documents = [json.loads(line)["text"] for line in mine.read_text(encoding="utf-8").splitlines()]
    probe = peelwise.Probe.from_text(documents[::2], tokenizer, tokens=3_000, in_distribution=True)
    settings = peelwise.AuditSettings(joint_rounds=2, solo_rounds=0, controls=False)
    cheat = peelwise.audit(model, replace(probe, fit=probe.report, select=probe.report), settings)
    loss = cheat.record.loss.model_copy(update={"unigram": probe_unigram(probe, model)})  # anybody can count
    said = cheat.record.model_copy(update={"probe": probe.record(), "loss": loss})
    write_certificate(tmp_path / "cheat", said, cheat.witness, probe)
    assert cheat.record.loss.composed_gain.low > 0.1
    assert peelwise.verify(tmp_path / "cheat", model).holds  # nothing in the folder betrays it
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": d}) for d in documents[1::2]), encoding="utf-8")
    opening = peelwise.OpenOptions(tokenizer=tmp_path / "tokenizer")
    result = peelwise.verify(tmp_path / "cheat", model, text=other, tokens=3_000, opening=opening)
    assert result.status == "does not hold"
    assert result.own.found.low < 0
    assert "On your text the witness gains" in result.reason


def test_an_honest_certificate_of_a_healthy_model_holds_on_other_text(mine, small_gpt, training_probe, tmp_path):
    """It claims no gain, so none is asked for; the one before this claims one."""
    model, tokenizer = small_gpt("final")
    settings = peelwise.AuditSettings(joint_rounds=1, solo_rounds=1, controls=False)
    rows = [row for part in ("fit", "select", "report") for row in getattr(training_probe, part).rows()]
    probe = peelwise.Probe.from_tokens(rows, tokens=31 * 128, in_distribution=True)
    report = peelwise.audit(model, probe, settings)
    report.save(tmp_path / "healthy")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert report.record.conclusion.case == "none-found"
    opening = peelwise.OpenOptions(tokenizer=tmp_path / "tokenizer")
    result = peelwise.verify(tmp_path / "healthy", model, text=mine, tokens=3_000, opening=opening)
    assert result.own.found.low <= result.own.margin
    assert result.status == "holds", result.reason


def test_a_block_that_is_said_to_gain_nothing_is_found_by_its_own_weights(audited, broken_folder, mine, tmp_path):
    report, _ = audited
    blocks = list(report.record.blocks)
    nothing = Paired(0.0, 1e-3, blocks[3].recoverable_nats.sequences).interval()
    blocks[3] = blocks[3].model_copy(update={"recoverable_nats": nothing})
    record = report.record.model_copy(update={"blocks": tuple(blocks)})
    verdicts = verdicts_of(record)
    blocks = [
        block.model_copy(update={"verdict": v.colour, "reason_code": v.reason, "interaction": v.interaction})
        for block, v in zip(blocks, verdicts, strict=True)
    ]
    record = record.model_copy(update={"blocks": tuple(blocks)})
    record = record.model_copy(update={"conclusion": conclusion_of(record)})
    assert blocks[3].verdict == "green"
    write_certificate(tmp_path / "forged", record, report.witness, report.probe)
    assert peelwise.verify(tmp_path / "forged", broken_folder).holds  # verdicts are not rechecked there
    result = peelwise.verify(tmp_path / "forged", broken_folder, text=mine, tokens=1_600)
    assert result.status == "does not hold"
    assert "its own weights gain more on your text" in result.reason
    assert blocks[3].name in result.reason


def test_a_module_needs_its_tokenizer(audited, broken_folder, mine):
    model = open_model(broken_folder).model
    with pytest.raises(ModelError, match="no tokenizer"):
        peelwise.verify(audited[1], model, text=mine)
    opening = peelwise.OpenOptions(tokenizer=broken_folder)
    assert peelwise.verify(audited[1], model, text=mine, tokens=1_600, opening=opening).own.found.low > 0


def test_the_command_says_both_gains(run, audited, broken_folder, mine, found):
    code, out, _ = run("verify", audited[1], "--model", broken_folder, "--text", mine, "--tokens", "1600")
    assert code == 0
    said = re.search(r"certified on the author's text: ([\d.]+); on yours: ([\d.]+) \(([\d.]+) to ([\d.]+)\)", out)
    own = found.own
    expected = (own.certified.mean, own.found.mean, own.found.low, own.found.high)
    assert said.groups() == tuple(f"{value:.3f}" for value in expected)
    assert "Margin: " in out
    assert str(broken_folder) in out.replace("\n", "")


@pytest.mark.parametrize("composed", [None, 0.002], ids=["no composed witness", "one that claims nothing"])
@pytest.mark.parametrize(("found", "refused"), [("grey", True), ("yellow", False), ("red", False)])
def test_what_blocks_alone_claim_has_to_be_found_in_one_of_them(composed, found, refused):
    """Solo witnesses may be fitted to report while the composed one is honest and gains nothing."""

    def gain(mean):
        return None if mean is None else Paired(mean, 0.001, 30).interval()

    blocks = (OwnBlock("a", "red", found, (gain(0.3), gain(0.01))), OwnBlock("b", "green", "grey", (gain(0), gain(0))))
    reason = not_confirmed(gain(composed), gain(composed), blocks, (0.02, 0.02))
    assert (reason is not None) == refused
    claims = not_confirmed(gain(0.5), gain(0.4), blocks, (0.02, 0.02))
    assert claims is None  # the composed witness confirms what it claims: undecided blocks are not counted
