"""A certificate holds for what was certified, and for nothing else."""

import copy
import dataclasses
import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from audits import ONE_ROUND, Snapshot, part_of, slow_losses, tiny_probe, written
from peelwise.certificate.audit import changes_of, merged_model, read_certificate, report_loss, verify_certificate
from peelwise.certificate.base import PROBE_FILE, WITNESS_FILE, tolerance_of, write_certificate
from peelwise.engine.witness import merge_
from peelwise.errors import CertificateError, PeelwiseError, UnsupportedModelError
from peelwise.evidence.audit import conclusion_of
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoints import open_model
from peelwise.model.fingerprint import tensors_sha256
from peelwise.records.audit import AuditRecord
from peelwise.records.files import RECORD_FILE
from peelwise.show.audit import words
from peelwise.tasks.audit.run import run_audit
from zoo import ZOO

OTHER = "not the same model or data"
NOTHING = dataclasses.replace(ONE_ROUND, joint_rounds=0, solo_rounds=0, controls=False)


@pytest.fixture
def folder(audited, tmp_path):
    """The test's own copy of a certificate of the small GPT with a broken block."""
    return shutil.copytree(audited[1], tmp_path / "certificate")


@pytest.fixture(scope="module")
def model(broken_folder):
    return open_model(broken_folder).model


def test_round_trip(audited):
    report, folder = audited
    certificate = read_certificate(folder)
    assert certificate.record.model_copy(update={"witness": None, "digest": None}) == report.record
    assert certificate.record.digest == certificate.record.computed_digest()
    assert certificate.probe.fingerprint == report.probe.fingerprint == report.record.probe.fingerprint
    assert certificate.witness.keys() == report.witness.keys()
    assert all(torch.equal(certificate.witness[name], tensor) for name, tensor in report.witness.items())
    assert json.loads((folder / RECORD_FILE).read_text())["schema"] == 1


def test_holds_and_leaves_the_model_alone(audited, model):
    before = Snapshot.of(model)
    result = verify_certificate(audited[1], model)
    before.assert_unchanged(model)
    assert result.holds
    assert [check.name for check in result.checks][:2] == ["loss.current", "loss.composed"]


def test_full_checks_every_number_of_every_block(audited, model):
    result = verify_certificate(audited[1], model, full=True)
    assert result.holds
    blocks = audited[0].record.blocks
    measured = [n for b in blocks for n in (b.unique_nats, b.recoverable_nats, b.removal_nats)]
    expected = 6 + 3 * sum(interval is not None for interval in measured)
    assert len(result.checks) == expected > 30
    assert max(abs(check.recorded - check.found) for check in result.checks) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_holds_with_other_micro_batches(name, dtype, tmp_path):
    model = ZOO[name]().to(dtype)
    settings = dataclasses.replace(ONE_ROUND, micro_batch_tokens=1, controls=False)
    outcome = run_audit(model, tiny_probe(), settings)
    write_certificate(tmp_path / "one", outcome.record, outcome.witness, outcome.probe)
    assert verify_certificate(tmp_path / "one", model, full=True).holds
    assert not verify_certificate(tmp_path / "one", ZOO["mistral"]()).holds


# -- tampering -----------------------------------------------------------------------------------------------


def edited(folder, path, value, *, reseal):
    """Change one value of the JSON; ``reseal`` as somebody would who knows about the digest."""
    content = json.loads((folder / RECORD_FILE).read_text())
    *outer, last = path.split(".")
    place = content
    for key in outer:
        place = place[int(key) if isinstance(place, list) else key]
    place[last] = place[last] + value if isinstance(value, float) else value
    (folder / RECORD_FILE).write_text(json.dumps(content))
    if reseal:
        record = AuditRecord.model_validate(content)
        (folder / RECORD_FILE).write_text(record.sealed().to_json())


NUMBERS = {
    "loss.current": 0.001,
    "loss.composed": -0.001,
    "loss.composed_gain.mean": 0.001,
    "loss.composed_gain.low": 0.001,
    "loss.composed_gain.high": 0.001,
    "blocks.0.recoverable_nats.mean": 0.001,
    "blocks.5.recoverable_nats.low": 0.001,
    "blocks.3.unique_nats.high": -0.001,
    "blocks.2.verdict": "green",
    "margin_nats": 1.0,
}


@pytest.mark.parametrize("path", [*NUMBERS, "loss.shuffled", "conclusion.case", "cost.wall_seconds", "blocks.0.energy"])
def test_a_changed_number_breaks_the_seal(path, folder, model):
    edited(folder, path, NUMBERS.get(path, "not-measured" if path == "conclusion.case" else 0.001), reseal=False)
    result = verify_certificate(folder, model)
    assert result.status == "does not hold"
    assert "changed after it was written" in result.reason


CLAIMS = {  # beside the numbers: what is derived from them, and what stands beside them
    "conclusion.case": "not-measured",
    "conclusion.blocks": [0],
    "conclusion.harmful": [1],
    "informative": False,
    "loss.shuffled": 0.001,
    "loss.untrained": 0.001,
    "loss.untrained_start": -0.001,
    "loss.head_control": 0.001,
    "loss.shuffled_gain.high": -0.001,
    "loss.composed_gain.standard_error": 0.001,
    "loss.composed_gain.skewness": 0.1,
    "loss.composed_gain.sequences": 100,
    "head.recoverable_nats.mean": 0.001,
    "head.relaxed": 1.0,
    "rounds.0.select_after": 0.001,
    "rounds.1.select_after": 1.0,
    "blocks.2.reason_code": "nothing-above-margin",
    "blocks.2.interaction": None,  # the other way round
    "blocks.2.index": 3,
    "blocks.2.tokens_needed": 1_000_000,
    "probe.report_tokens": 10_000,
    "probe.in_distribution": False,
    "model.parameters": 1,
    "model.dtype": "bfloat16",
}


@pytest.mark.parametrize("path", [*NUMBERS, *CLAIMS])
def test_a_record_that_contradicts_itself_is_found_without_a_pass(path, folder, model):
    record = read_certificate(folder).record
    assert "green" not in {block.verdict for block in record.blocks}  # or the forged colour would be no forgery
    forged = {**NUMBERS, **CLAIMS}[path]
    edited(folder, path, not record.blocks[2].interaction if forged is None else forged, reseal=True)
    result = verify_certificate(folder, model)
    assert result.status == "does not hold"
    assert not result.checks
    assert "changed after it was written" not in result.reason


def moved(interval, by):
    return interval.model_copy(update={part: getattr(interval, part) + by for part in ("mean", "low", "high")})


def with_composed(record, by):
    loss = record.loss
    update = {"composed": loss.composed - by, "composed_gain": moved(loss.composed_gain, by)}
    return record.model_copy(update={"loss": loss.model_copy(update=update)})


def with_block(record, by, part):
    block = record.blocks[3]
    block = block.model_copy(update={part: moved(getattr(block, part), by)})
    return record.model_copy(update={"blocks": (*record.blocks[:3], block, *record.blocks[4:])})


def with_shuffled(record, by):
    loss = record.loss
    update = {"shuffled": loss.shuffled - by, "shuffled_gain": moved(loss.shuffled_gain, by)}
    return record.model_copy(update={"loss": loss.model_copy(update=update)})


@pytest.mark.parametrize(
    ("forge", "quick", "full"),
    [
        (with_composed, "loss.composed:", "loss.composed:"),
        (lambda r, by: with_block(r, by, "recoverable_nats"), "holds", "layers.3 recoverable.mean:"),
        (lambda r, by: with_block(r, by, "unique_nats"), "holds", "layers.3 unique.mean:"),
        (lambda r, by: with_block(r, by, "removal_nats"), "holds", "layers.3 removal.mean:"),
        (with_shuffled, "holds", "holds"),
    ],
    ids=["composed", "alone", "unique", "removal", "a control, which is not rechecked"],
)
def test_a_record_forged_without_contradiction_is_found_by_recomputing(forge, quick, full, folder, model):
    record = forge(read_certificate(folder).record, 0.001)
    record = record.model_copy(update={"conclusion": conclusion_of(record)}).sealed()
    (folder / RECORD_FILE).write_text(record.to_json())
    for whole, found in ((False, quick), (True, full)):
        result = verify_certificate(folder, model, full=whole)
        assert result.holds == (found == "holds")
        assert result.holds or found in result.reason
        assert any("controls" in words for words in result.not_rechecked)
        assert any("every block's" in words for words in (result.rechecked if whole else result.not_rechecked))


def test_the_tolerance_follows_from_the_model_and_not_from_the_record(folder, model):
    assert tolerance_of(model) == verify_certificate(folder, model).tolerance == 3e-4
    assert tolerance_of(copy.deepcopy(model).bfloat16()) == 5e-3
    edited(folder, "model.dtype", "bfloat16", reseal=True)
    assert "model.dtype: bfloat16 was certified, float32 was found" in verify_certificate(folder, model).reason


def test_sealing_an_unchanged_record_again_still_holds(folder, model):
    """The control of the two tests above."""
    edited(folder, "loss.current", 0.0, reseal=True)
    assert verify_certificate(folder, model, full=True).holds


@pytest.mark.parametrize("path", ["model.fingerprint", "probe.fingerprint"])
def test_another_fingerprint_is_another_model_or_data(path, folder, model):
    edited(folder, path, "0" * 64, reseal=True)
    assert verify_certificate(folder, model).status == OTHER


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(
    ("name", "status", "words"), [(WITNESS_FILE, "does not hold", "SHA-256"), (PROBE_FILE, OTHER, "not the probe")]
)
def test_one_byte_of_a_tensor(name, status, words, fraction, folder, model):
    file = folder / name
    flip(file, int(fraction * file.stat().st_size))
    result = verify_certificate(folder, model)
    assert result.status == status
    assert name in result.reason
    assert words in result.reason


@pytest.mark.parametrize("name", [WITNESS_FILE, PROBE_FILE])
def test_one_byte_of_a_header(name, folder, model):
    flip(folder / name, 8)  # the brace that opens the list of tensors
    with pytest.raises(CertificateError, match=name):
        verify_certificate(folder, model)


def test_a_forged_witness_under_new_sums_does_not_reach_the_loss(folder, model):
    witness = load_file(folder / WITNESS_FILE)
    name = next(name for name in witness if name.startswith("composed/"))
    save_file(witness | {name: -witness[name]}, folder / WITNESS_FILE)
    edited(folder, "witness.sha256", hashlib.sha256((folder / WITNESS_FILE).read_bytes()).hexdigest(), reseal=True)
    result = verify_certificate(folder, model)
    assert result.status == "does not hold"
    assert result.reason.startswith("loss.composed")


def test_one_weight_of_the_model(audited, model):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.norm.weight[0] = changed.model.norm.weight[0] + 1e-6
    assert verify_certificate(audited[1], changed).status == OTHER


def test_sentences_of_old_are_neither_compared_nor_believed(folder, model):
    """A record of old says in words what the codes say now; other words change nothing, and are not shown."""
    content = json.loads((folder / RECORD_FILE).read_text())
    content["conclusion"] = "All is well."
    for block in content["blocks"]:
        del block["reason_code"]
        block["reason"] = "All is well."
    record = AuditRecord.model_validate(content).sealed()
    (folder / RECORD_FILE).write_text(record.to_json())
    assert verify_certificate(folder, model).holds
    assert "All is well." in (folder / RECORD_FILE).read_text()
    before = record.model_copy(update={"conclusion": conclusion_of(record)})
    assert words.conclusion(record) == words.conclusion(before)
    assert "All is well." not in (words.conclusion(record), *words.reasons(record))
    edited(folder, "blocks.2.verdict", "green", reseal=True)
    assert not verify_certificate(folder, model).holds  # the control: what the words stood for is compared


# -- folders that are no certificate ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [RECORD_FILE, WITNESS_FILE, PROBE_FILE])
@pytest.mark.parametrize("harm", ["missing", "cut", "empty"])
def test_missing_and_cut_files_are_named(name, harm, folder):
    file = folder / name
    content = file.read_bytes()
    file.unlink()
    if harm != "missing":
        file.write_bytes(content[: len(content) // 2] if harm == "cut" else b"")
    with pytest.raises(CertificateError, match=name):
        read_certificate(folder)


@pytest.mark.parametrize(
    ("path", "value", "words"), [("schema", 2, "schema 2"), ("schema", 0, "schema 0"), ("loss", None, "loss")]
)
def test_records_this_version_cannot_read(path, value, words, folder):
    edited(folder, path, value, reseal=False)
    with pytest.raises(CertificateError, match=words):
        read_certificate(folder)


def test_a_failed_write_leaves_nothing(audited, tmp_path):
    report, _ = audited

    def fail(record):
        raise OSError(28, "No space left on device")

    with pytest.raises(PeelwiseError, match="No space left"):
        write_certificate(tmp_path / "out", report.record, report.witness, report.probe, fail)
    assert not list(tmp_path.iterdir())


# -- the witness in a model --------------------------------------------------------------------------------------


def test_merged_model_has_the_certified_loss(audited, model):
    certificate = read_certificate(audited[1])
    before = Snapshot.of(model)
    merged = merged_model(certificate, model)
    before.assert_unchanged(model)
    rows = certificate.probe.report.ids.tolist()
    loss = float(slow_losses(merged, rows).sum()) / certificate.probe.report.tokens
    certified = certificate.record.loss
    assert loss == pytest.approx(certified.composed, abs=1e-5) == report_loss(merged, certificate.probe)
    assert certified.current - loss > 0.5  # the control: the witness gains something


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "neox-parallel"])
def test_biases_and_conv1d_are_merged_the_right_way_round(name, tmp_path):
    model = ZOO[name]()
    outcome = run_audit(model, tiny_probe(), dataclasses.replace(ONE_ROUND, controls=False))
    fake = {f"composed/{m.name}": 0.01 * torch.ones(m.weight().shape[0], m.weight().shape[1] + m.has_bias)
            for block in find_blocks(model) for m in block.linears}  # fmt: skip
    write_certificate(tmp_path / "out", outcome.record, fake, outcome.probe)
    certificate = read_certificate(tmp_path / "out")
    merged = merged_model(certificate, model)
    expected = written(model, changes_of(fake, "composed", find_blocks(model)))
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), expected.parameters(), strict=True))


def test_witness_of_another_shape_is_refused(audited, model):
    witness = dict(audited[0].witness)
    name = next(name for name in witness if name.startswith("composed/"))
    with pytest.raises(CertificateError, match=r"is \(2, 3\), expected"):
        changes_of({name: torch.zeros(2, 3)}, "composed", find_blocks(model))


def test_merging_into_another_model_is_refused(audited, stored_stage):
    with pytest.raises(CertificateError, match="not the same model"):
        merged_model(read_certificate(audited[1]), stored_stage("early")[0])


def test_merging_without_a_witness_is_refused(audited, model):
    certificate = dataclasses.replace(read_certificate(audited[1]), witness={})
    with pytest.raises(CertificateError, match="no composed witness"):
        merged_model(certificate, model)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn], ids=str)
def test_nothing_is_written_into_packed_weights(dtype):
    model = ZOO["plain"]()
    linear = model.blocks[1].attention.out
    change = {"composed/blocks.1.attention.out": torch.ones(48, 49)}
    assert merge_(change, "composed", find_blocks(copy.deepcopy(model)))  # the control
    linear.weight = torch.nn.Parameter(torch.ones(48, 48).to(dtype), requires_grad=False)
    before = linear.bias.clone()
    with pytest.raises(
        UnsupportedModelError, match=r"blocks\.1\.attention\.out: .* keeps its weights packed, weight as"
    ):
        merge_(change, "composed", find_blocks(model))
    assert torch.equal(linear.weight.float(), torch.ones(48, 48))
    assert torch.equal(linear.bias, before)


# -- the same tensors, another model ---------------------------------------------------------------------------------


@pytest.fixture
def turned(model):
    """The certified tensors under a rotary base of 100."""
    config = copy.deepcopy(model.config)
    config.rope_parameters["rope_theta"] = 100.0
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_genuine_tensors_under_another_rotary_base_are_not_the_certified_model(folder, model, turned):
    result = verify_certificate(folder, turned)
    assert result.status == OTHER
    assert "rope_parameters.rope_theta is 100.0, 10000.0 was certified" in result.reason
    assert "as it was handed over" in result.model  # what was opened is said there too
    with pytest.raises(CertificateError, match="rope_theta"):
        merged_model(read_certificate(folder), turned)
    same = verify_certificate(folder, model)
    assert same.holds
    assert "the model's tensors, configuration and unsaved buffers" in same.rechecked


def test_an_audit_of_it_does_not_have_the_genuine_fingerprint(audited, turned, training_probe):
    outcome = run_audit(turned, part_of(training_probe, fit=4, select=2, report=4), NOTHING)
    genuine = audited[0].record.model
    assert tensors_sha256(turned) == tensors_sha256(open_model(genuine.source).model)
    assert outcome.record.model.fingerprint != genuine.fingerprint
    assert outcome.record.model.configuration["rope_parameters.rope_theta"] == 100.0


def test_a_configuration_that_is_left_out_or_rewritten_is_another_model_or_said(folder, model, turned):
    edited(folder, "model.configuration", {}, reseal=True)
    assert verify_certificate(folder, model).status == OTHER
    edited(folder, "model.configuration", None, reseal=True)
    assert verify_certificate(folder, model).status == OTHER
    edited(folder, "model.fingerprint", tensors_sha256(model), reseal=True)  # as an older version wrote it
    old = verify_certificate(folder, model)
    assert old.holds
    assert any("older and does not have it" in said for said in old.not_rechecked)
    assert verify_certificate(folder, turned).status == "does not hold"  # its losses are others
