"""Checks and audits of models that predict no next tokens, from the damage to the certificate."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import peelwise
from example_models import KINDS, Diffusion, bert, digits, noisy, trained_vit
from peelwise.certificate.base import tolerance_of, unit_loss
from peelwise.errors import CertificateError, OptionError
from peelwise.evidence.audit import contradictions
from peelwise.evidence.verdict import default_margin
from peelwise.model.fingerprint import fingerprint
from peelwise.records.files import RECORD_FILE
from peelwise.tasks.audit.settings import AuditSettings

BLOCK = 3


@pytest.fixture(scope="module")
def healthy() -> nn.Module:
    return trained_vit()


@pytest.fixture(scope="module")
def probe() -> peelwise.Probe:
    pixels, labels = digits()
    return peelwise.Probe.from_batches([{"pixel_values": pixels[:240], "labels": labels[:240]}], in_distribution=True)


@pytest.fixture(scope="module")
def broken(healthy: nn.Module) -> nn.Module:
    """Block 3 subtracts what its MLP should add."""
    model = copy.deepcopy(healthy)
    writer = model.vit.layers[BLOCK].mlp.fc2  # type: ignore[union-attr, index]
    with torch.no_grad():
        writer.weight.neg_()
        writer.bias.neg_()
    return model


@pytest.fixture(scope="module")
def checked(broken: nn.Module, probe: peelwise.Probe) -> Any:
    before, state = fingerprint(broken), torch.get_rng_state()
    report = peelwise.check(broken, probe)
    assert fingerprint(broken) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad and p.grad is None for p in broken.parameters())
    return report


@pytest.fixture(scope="module")
def audited(broken: nn.Module, probe: peelwise.Probe) -> Any:
    before = fingerprint(broken)
    report = peelwise.audit(broken, probe, AuditSettings("3m", 2, 1))
    assert fingerprint(broken) == before
    return report


def test_the_check_names_the_damaged_block_first_and_the_factor_that_mends_it(checked: Any) -> None:
    record = checked.record
    scores = [block.score for block in record.blocks]
    assert scores.index(max(scores)) == record.unlike[0].block == BLOCK
    best = record.gain_witnesses[0]
    assert (best.block, best.part) == (BLOCK, "mlp")
    assert best.factor == pytest.approx(-1, abs=0.4)
    assert best.gain.low > record.margin_nats
    assert (record.probe.unit, record.probe.loss) == ("loss", "labels")


def test_its_words_are_of_loss_and_examples_not_of_nats_and_text(checked: Any, audited: Any) -> None:
    for report in (checked, audited):
        page = re.sub(r"<style.*?</style>|<svg.*?</svg>|margin_nats", "", report.to_html(), flags=re.DOTALL)
        said = str(report) + page + report.conclusion
        assert "nats" not in said
        assert "examples" in said
        assert "--text" not in said
        assert "counting tokens" in str(report)  # a note, which says that nothing is said of it
    assert "lowers the loss by" in checked.conclusion
    assert "lower the loss by" in audited.conclusion


def test_the_audit_certifies_the_damaged_block_and_its_controls_do_nothing(audited: Any) -> None:
    record = audited.record
    assert record.blocks[BLOCK].verdict == "red"
    assert record.check.unlike[0].block == BLOCK
    assert {n.values["block"] for n in record.notes if n.code == "factor-first"} >= {BLOCK}
    assert record.loss.composed_gain.low > 0.5 * record.loss.current
    assert record.loss.shuffled_gain.high < record.loss.composed_gain.low
    assert record.loss.untrained > record.loss.composed
    assert record.informative
    assert record.complete
    assert (record.loss.unigram, record.loss.without_blocks, record.head) == (None, None, None)
    assert record.margin_nats == pytest.approx(0.005 * record.loss.current)


def test_the_certificates_hold_in_full_and_any_change_of_them_does_not(
    checked: Any, audited: Any, broken: nn.Module, healthy: nn.Module, tmp_path: Path
) -> None:
    for name, report in (("check", checked), ("audit", audited)):
        folder = report.save(tmp_path / name)
        found = peelwise.verify(folder, broken, full=True)
        assert found.status == "holds", found.reason
        assert "240 examples drawn from 240 of the batches" in str(found.split)
        assert peelwise.verify(folder, healthy).status == "not the same model or data"
        with pytest.raises(CertificateError, match="about batches"):
            peelwise.verify(folder, broken, text=[__file__])
        with pytest.raises(OptionError, match="of no function of yours"):
            peelwise.verify(folder, broken, loss=cross)
    assert peelwise.verify(tmp_path / "audit", broken, replay=True).holds
    path = tmp_path / "audit" / RECORD_FILE
    record = json.loads(path.read_text())
    record["probe"]["unit"] = "nats per token"  # another margin, tolerance and other words follow from it
    record.pop("digest")
    path.write_text(json.dumps(record))
    assert not peelwise.verify(tmp_path / "audit", broken).holds


def cross(outputs: Any, batch: Any) -> Tensor:
    return 1e-3 * cross_entropy(outputs.logits, batch["labels"], reduction="none")


def test_a_loss_of_ones_own_has_its_unit_and_is_given_again_to_verify(
    broken: nn.Module, checked: Any, tmp_path: Path
) -> None:
    pixels, labels = digits()
    batches = [{"pixel_values": pixels[:240], "labels": labels[:240]}]
    probe = peelwise.Probe.from_batches(batches, cross, unit="millinats", in_distribution=True)
    report = peelwise.check(broken, probe)
    assert report.record.loss == pytest.approx(1e-3 * checked.record.loss, rel=1e-4)
    # What is judged by the size of the loss is the same for a thousandth of it.
    assert [u.block for u in report.record.unlike] == [u.block for u in checked.record.unlike]
    assert report.record.gain_witnesses[0].factor == pytest.approx(checked.record.gain_witnesses[0].factor, abs=0.02)
    assert "millinats (" in report.conclusion
    folder = report.save(tmp_path / "mine")
    assert peelwise.verify(folder, broken, loss=cross).holds
    with pytest.raises(CertificateError, match=r"no file holds: check it from Python with peelwise.verify"):
        peelwise.verify(folder, broken)
    other = peelwise.verify(folder, broken, loss=lambda outputs, batch: 1.01 * cross(outputs, batch))
    assert other.status == "does not hold"


def squared(outputs: Tensor, batch: Any) -> Tensor:
    return (outputs - batch["noise"]).square().flatten(1).mean(dim=1)


def test_a_diffusion_transformer_of_ones_own_is_checked_with_its_own_loss(tmp_path: Path) -> None:
    model, batch = Diffusion().eval(), noisy(120)
    probe = peelwise.Probe.from_batches([batch], squared, unit="squared error")
    report = peelwise.check(model, probe)
    columns = probe.report.taken(probe.report.inputs)  # type: ignore[attr-defined]
    with torch.no_grad():
        loss = float(squared(model(columns["x"], columns["t"], columns["y"]), columns).mean())
    assert report.record.loss == pytest.approx(loss, rel=1e-5)
    audit = peelwise.audit(model, probe, AuditSettings("3m", 1, 1, controls=False))
    assert audit.record.loss.composed_gain.low > audit.record.margin_nats  # of random weights much is left
    assert "squared error" in audit.conclusion
    assert peelwise.verify(audit.save(tmp_path / "dit"), model, loss=squared).holds


def test_numbers_of_next_tokens_are_a_contradiction_in_an_audit_of_batches(audited: Any) -> None:
    record = audited.record
    assert not list(contradictions(record, 1e-4))
    for name in ("unigram", "without_blocks", "head_control"):
        loss = record.loss.model_copy(update={name: record.loss.current})
        said = " ".join(contradictions(record.model_copy(update={"loss": loss}), 1e-4))
        assert f"loss.{name}: it was certified, and a probe of batches has none." in said


@pytest.mark.parametrize("kind", ["masked", "classifier", "encoder-decoder"])
def test_every_kind_has_a_check_and_an_audit_whose_certificates_hold(kind: str, tmp_path: Path) -> None:
    make, batches = KINDS[kind]
    model, probe = make(), peelwise.Probe.from_batches([batches(40)])
    before = fingerprint(model)
    check = peelwise.check(model, probe)
    assert all(block.score is not None for block in check.record.blocks)
    audit = peelwise.audit(model, probe, AuditSettings("3m", 1, 1, controls=False))
    assert audit.record.complete
    assert audit.record.loss.composed_gain is None or audit.record.loss.composed_gain.sequences == 14
    assert fingerprint(model) == before
    for name, report in (("check", check), ("audit", audit)):
        assert peelwise.verify(report.save(tmp_path / name), model).holds


def test_weights_that_were_fitted_gain_what_the_record_says(broken: nn.Module, audited: Any) -> None:
    """The composed witness written into the weights by hand gives the certified loss."""
    model = copy.deepcopy(broken)
    modules = dict(model.named_modules())
    for name, change in audited.witness.items():
        kind, _, layer = name.partition("/")
        if kind == "composed":
            module: Any = modules[layer]
            width = module.weight.shape[1]
            with torch.no_grad():
                module.weight += change.float()[:, :width]
                module.bias += change.float()[:, width]
    report = audited.probe.report
    columns = report.taken(report.inputs)
    with torch.no_grad():
        loss = cross_entropy(model(pixel_values=columns["pixel_values"]).logits, columns["labels"])
    assert float(loss) == pytest.approx(audited.record.loss.composed, abs=1e-4)


@pytest.mark.parametrize(("unit", "margin"), [("nats per token", 0.003), ("loss", 0.0005)])
def test_margins_in_other_units_are_shares_alone(unit: str, margin: float) -> None:
    assert default_margin(0.1, unit) == margin


def test_tolerances_go_by_the_size_of_the_loss(checked: Any) -> None:
    model = bert()
    assert unit_loss(checked.record) == checked.record.loss
    assert tolerance_of(model, 0.3) == pytest.approx(0.1 * tolerance_of(model))
    text = checked.record.model_copy(update={"probe": checked.record.probe.model_copy(update={"loss": None})})
    assert unit_loss(text) is None


def test_files_of_batches_above_the_limit_are_not_written(monkeypatch: Any, checked: Any, tmp_path: Path) -> None:
    monkeypatch.setattr("peelwise.certificate.base.PROBE_BYTES", 10_000)
    with pytest.raises(peelwise.errors.OutputError, match="Give fewer or smaller examples"):
        checked.save(tmp_path / "large")
    assert not (tmp_path / "large").exists()
