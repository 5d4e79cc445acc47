"""The certificate of a peel holds for what was certified, and for nothing else."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import peelwise
from audits import Snapshot, part_of, slow_losses, tiny_probe
from peelwise.api.files import write_report
from peelwise.certificate.base import PROBE_FILE, WITNESS_FILE, read_probe
from peelwise.certificate.own_text import Text, cut_like
from peelwise.certificate.peel import on_own_text
from peelwise.errors import CertificateError
from peelwise.model.checkpoints import open_model
from peelwise.model.guard import untouched
from peelwise.records.files import RECORD_FILE, read_any_record, read_record
from peelwise.records.peel import PeelRecord
from zoo import ZOO

OTHER = "not the same model or data"


@pytest.fixture(scope="module")
def peeled(broken_folder, training_probe, tmp_path_factory):
    """A peel of the small GPT with a broken block, and where it is saved."""
    probe = part_of(training_probe, fit=10, select=4, report=10)
    maps = [[1, 2, 5, 5, 5, 6], [1, 2, 3, 4, 5, 6]]
    report = peelwise.peel(broken_folder, probe, peelwise.PeelSettings(maps=maps, rounds=1, controls=False))
    return report, report.save(tmp_path_factory.mktemp("peeled") / "certificate")


@pytest.fixture(scope="module")
def model(broken_folder):
    return open_model(broken_folder).model


@pytest.fixture
def folder(peeled, tmp_path):
    return shutil.copytree(peeled[1], tmp_path / "certificate")


def test_holds_and_leaves_the_model_alone(peeled, model):
    report, folder = peeled
    before = Snapshot.of(model)
    result = peelwise.verify(folder, model)
    before.assert_unchanged(model)
    assert result.holds
    names = [check.name for check in result.checks]
    assert {"loss.current", "loss.head_control", "loss.bound", "loss.over_head_control.low"} <= set(names)
    assert max(abs(check.recorded - check.found) for check in result.checks) < 1e-5
    assert peelwise.verify(folder).holds  # from where it was opened
    record = read_any_record(folder)
    assert isinstance(record, PeelRecord)
    assert record.model_copy(update={"witness": None, "digest": None}) == report.record
    assert json.loads((folder / RECORD_FILE).read_text())["schema"] == 1
    assert (folder / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "opt", "gemma2", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["warm", "cold"])
def test_holds_for_every_kind_of_block_and_start(name, dtype, start, tmp_path):
    model = ZOO[name]().to(dtype)
    report = peelwise.peel(
        model, tiny_probe(), peelwise.PeelSettings(maps=[[2, 2, 3]], rounds=1, controls=False, start=start)
    )
    assert any(key.startswith("stack/") for key in report.witness)
    assert peelwise.verify(report.save(tmp_path / "one"), model).holds


@pytest.mark.parametrize(
    ("file", "status"), [(WITNESS_FILE, "does not hold"), (PROBE_FILE, OTHER), (RECORD_FILE, "does not hold")]
)
@pytest.mark.parametrize("fraction", [0.4, 0.9])
def test_one_byte_anywhere(file, status, fraction, folder, model):
    content = bytearray((folder / file).read_bytes())
    place = int(fraction * len(content))
    if file == RECORD_FILE:  # another digit is still JSON
        place = next(i for i in range(place, len(content)) if chr(content[i]) in "123456")
        content[place] += 1
    else:
        content[place] ^= 1
    (folder / file).write_bytes(bytes(content))
    assert peelwise.verify(folder, model).status == status


def resealed(folder, change):
    """Change the record and seal it again, as somebody would who knows about the digest."""
    content = json.loads((folder / RECORD_FILE).read_text())
    change(content)
    (folder / RECORD_FILE).write_text(PeelRecord.model_validate(content).sealed().to_json())


@pytest.mark.parametrize("key", ["current", "head_control", "bound"])
def test_a_changed_number_under_a_new_seal_contradicts_the_others(key, folder, model):
    resealed(folder, lambda content: content["loss"].update({key: content["loss"][key] - 0.001}))
    result = peelwise.verify(folder, model)
    assert result.status == "does not hold"
    assert "loss." in result.reason


def test_a_change_that_agrees_with_itself_is_found_by_recomputing(folder, model):
    """Every loss is lowered alike, so that no gain changes."""

    def lower(content):
        for key in ("current", "head_control", "bound"):
            content["loss"][key] -= 0.001
        for part in ("loss", "own_head"):
            content["maps"][0][part]["report"] -= 0.001
        content["margin_nats"] = max(0.005 * content["loss"]["current"], 0.003)

    resealed(folder, lower)
    result = peelwise.verify(folder, model)
    assert result.status == "does not hold"
    assert "loss.current" in result.reason
    assert result.checks


CLAIMS = {
    "conclusion": lambda c: c["conclusion"].update(redundant=[0, 1, 2, 3, 4], case="uninformative"),
    "informative": lambda c: c.update(informative=True),
    "margin_nats": lambda c: c.update(margin_nats=1.0),
    "verdict": lambda c: c["blocks"][2].update(verdict="undecided"),
    "best_map": lambda c: c.update(best_map=[1, 2, 3, 4, 5, 6]),
    "low": lambda c: c["maps"][1]["gain_over_model"].update(low=-9.0),
    "over_head_control": lambda c: c["loss"].update(over_head_control=None),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_that_does_not_follow_is_found(name, folder, model):
    resealed(folder, CLAIMS[name])
    result = peelwise.verify(folder, model)
    assert result.status == "does not hold"
    assert name in result.reason


MAPS = {
    "a station less": lambda c: (c["maps"][0]["stations"].pop(), c["best_map"].pop()),
    "a station beyond": lambda c: (c["maps"][0]["stations"].__setitem__(0, 99), c["best_map"].__setitem__(0, 99)),
    "station 0": lambda c: (c["maps"][0]["stations"].__setitem__(0, 0), c["best_map"].__setitem__(0, 0)),
    "no errors": lambda c: c["maps"][1].update(unexplained=[]),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_of_another_shape_are_one_line(name, folder, model):
    content = json.loads((folder / RECORD_FILE).read_text())
    MAPS[name](content)
    (folder / RECORD_FILE).write_text(json.dumps(content))
    for act in (lambda: peelwise.verify(folder, model), lambda: write_report(folder)):
        with pytest.raises(CertificateError, match=r"not a valid certificate: .*has not one of") as caught:
            act()
        assert "\n" not in str(caught.value)


def test_maps_of_another_model_are_found(folder, model):
    def fewer(content):
        for one in content["maps"]:
            one["stations"] = [min(station, 5) for station in one["stations"][:5]]
            one["unexplained"].pop()
        content["best_map"] = content["maps"][0]["stations"]

    resealed(folder, fewer)
    result = peelwise.verify(folder, model)
    assert result.status == "does not hold"
    assert "stations for 5 blocks, the model has 6" in result.reason


def test_one_weight_of_the_model(peeled, broken_folder):
    other = open_model(broken_folder).model
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-3
    assert peelwise.verify(peeled[1], other).status == OTHER


def forged(folder, change):
    """Write another witness and seal the record over it, as somebody would who knows how."""
    witness = load_file(folder / WITNESS_FILE)
    change(witness)
    save_file(witness, folder / WITNESS_FILE)
    import hashlib

    content = json.loads((folder / RECORD_FILE).read_text())
    content["witness"]["bytes"] = (folder / WITNESS_FILE).stat().st_size
    content["witness"]["sha256"] = hashlib.sha256((folder / WITNESS_FILE).read_bytes()).hexdigest()
    (folder / RECORD_FILE).write_text(PeelRecord.model_validate(content).sealed().to_json())


def test_a_forged_stack_does_not_reach_the_loss(folder, model):
    def zero_one(witness):
        name = next(n for n in witness if n.startswith("stack/"))
        witness[name] = torch.zeros_like(witness[name])

    forged(folder, zero_one)
    assert peelwise.verify(folder, model).status == "does not hold"


def test_a_witness_that_does_not_fit_is_named(folder, model):
    name = "stack/model.layers.2.mlp.down_proj.weight"
    forged(folder, lambda witness: witness.update({name: witness[name][:, :-1].contiguous()}))
    with pytest.raises(CertificateError, match=r"layers\.2\.mlp\.down_proj"):
        peelwise.verify(folder, model)
    forged(folder, lambda witness: witness.pop(name) is None or witness.update({"stack/nothing": torch.ones(1)}))
    with pytest.raises(CertificateError, match="nothing"):
        peelwise.verify(folder, model)


def test_commands_for_audits_name_the_kind(folder, audited, tmp_path):
    with pytest.raises(CertificateError, match="certificate of a peel, expected one of an audit"):
        read_record(folder)
    with pytest.raises(CertificateError, match="peel"):
        peelwise.apply(folder, None, tmp_path / "new")
    content = json.loads((folder / RECORD_FILE).read_text()) | {"kind": "prophecy"}
    (folder / RECORD_FILE).write_text(json.dumps(content))
    with pytest.raises(CertificateError, match="prophecy"):
        peelwise.verify(folder)
    assert read_record(audited[1]).kind == "audit"


# -- what stands beside the numbers ------------------------------------------------------------------------------------

BESIDE = {
    **{f"probe.{name}": 7 for name in ("sequence_length", "fit_tokens", "select_tokens", "report_tokens")},
    **{f"probe.{name}": 3 for name in ("fit_sequences", "select_sequences", "report_sequences")},
    "model.parameters": 1,
    "model.blocks": 5,
    "model.dtype": "bfloat16",
    "model.architecture": "GPT2LMHeadModel",
}


@pytest.mark.parametrize("path", BESIDE)
def test_sizes_and_dtype_that_are_not_so_are_found(path, folder, model):
    part, name = path.split(".")
    resealed(folder, lambda content: content[part].update({name: BESIDE[path]}))
    result = peelwise.verify(folder, model)
    assert result.status == "does not hold"
    assert f"{path}: {BESIDE[path]} was certified" in result.reason


def test_sealing_an_unchanged_record_again_still_holds(folder, model):
    """The control of all forgeries here."""
    resealed(folder, lambda content: None)
    assert peelwise.verify(folder, model).holds


def test_the_certified_tensors_under_another_configuration(folder, model):
    config = copy.deepcopy(model.config)
    config.rope_parameters["rope_theta"] = 100.0
    turned = type(model)(config).eval()
    turned.load_state_dict(model.state_dict())
    result = peelwise.verify(folder, turned)
    assert result.status == OTHER
    assert "rope_theta is 100.0" in result.reason


# -- on text of whoever checks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    from small_gpt.text import held_out_documents

    file = tmp_path_factory.mktemp("mine") / "mine.jsonl"
    file.write_text("\n".join(json.dumps({"text": d}) for d in held_out_documents()), encoding="utf-8")
    return file


def test_a_stack_on_other_text_gains_what_it_gains_there(peeled, broken_folder, model, mine):
    report, folder = peeled
    result = peelwise.verify(folder, broken_folder, text=mine, tokens=1_600)
    assert result.status == "holds", result.reason
    own = result.own
    assert own.certified == report.record.loss.certified
    assert own.found.low > 0
    assert 1_000 < own.tokens <= 1_600
    # Slow and obvious: the model's own loss on the same sequences, one by one.
    documents = [json.loads(line)["text"] for line in mine.read_text(encoding="utf-8").splitlines()]
    text = Text(documents, open_model(broken_folder).tokenizer, 1_600, "mine")
    rows = cut_like(text, report.probe, model).split.rows()
    assert own.loss == pytest.approx(float(slow_losses(model, rows).sum()) / own.tokens, abs=1e-5)


def test_a_stack_of_noise_that_was_certified_gains_nothing_on_other_text(peeled, broken_folder, mine):
    """The control: what is said to be certified of it is not so there."""
    _, original = peeled
    witness = load_file(original / WITNESS_FILE)
    stack = [name for name in witness if name.startswith("stack/")]
    noise = {name: torch.randn(witness[name].shape, generator=torch.Generator().manual_seed(0)) for name in stack}
    record = read_any_record(original)
    opened = open_model(broken_folder)
    documents = [json.loads(line)["text"] for line in mine.read_text(encoding="utf-8").splitlines()]
    probe = read_probe(original, record)
    forged = witness | {name: (0.1 * noise[name]).to(witness[name].dtype) for name in stack}
    with untouched(opened.model):
        own = on_own_text(record, forged, probe, opened.model, Text(documents, opened.tokenizer, 1_600, "mine"))
    assert not own.holds
    assert "On your text the reference stack gains" in own.reason
