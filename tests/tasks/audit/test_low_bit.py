"""Audits of models with low-bit layers: witnesses are codes and scales of the same formats."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peelwise
from audits import ONE_ROUND, Snapshot, tiny_probe
from gguf_files import llama_of_whole_blocks, write_llama_gguf
from peelwise.certificate.audit import merged_model, read_certificate, report_loss
from peelwise.engine.witness import changes_of, codes_of
from peelwise.errors import CertificateError, FormatError
from peelwise.evidence.audit import contradictions
from peelwise.formats.membership import check_member
from peelwise.formats.table import parse_format
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoints import open_model, save_model
from peelwise.nn import quantize_, save_pretrained
from peelwise.tasks.audit.run import run_audit
from zoo import ZOO


@cache
def _audited(name: str, form: str, skip: tuple[str, ...]):
    torch.manual_seed(0)
    model = ZOO[name]()
    swapped = quantize_(model, form, skip=skip)
    return (
        model,
        swapped,
        run_audit(model, tiny_probe(in_distribution=True), replace(ONE_ROUND, controls=name == "plain")),
    )


@pytest.mark.parametrize(
    ("name", "form", "skip"),
    [
        pytest.param("plain", "ternary:tensor", (), marks=pytest.mark.nightly),
        pytest.param("llama", "ternary:tensor", (), marks=pytest.mark.nightly),
        ("qwen2", "int2:group=16,affine", ("down_proj",)),  # biases, and dense maps among low-bit ones
        ("llama-tied", "int3:minimum,band=24", ()),
    ],
)
def test_the_witness_of_a_low_bit_model_is_in_its_formats_and_is_certified(tmp_path, name, form, skip) -> None:
    model, swapped, outcome = _audited(name, form, skip)
    record = outcome.record
    (found,) = [note for note in record.notes if note.code == "low-bit"]
    assert found.values["layers"] == len(swapped)
    assert all(each.select_after < each.select_before for each in record.rounds)
    assert 0 < record.rounds[-1].flipped < 0.5
    blocks = find_blocks(model)
    low_bit = [m for block in blocks for m in block.linears if m.low_bit]
    flipped = 0
    for kind in ("composed", "alone"):
        for linear in low_bit:
            held = linear.held()
            encoded = codes_of(outcome.witness, kind, linear, held)
            if encoded is None:
                continue  # no better codes were found for this layer
            check_member(encoded, parse_format(form), tuple(held.weight.shape))
            flipped += int((encoded.codes != held.encoded.codes).sum())
    assert flipped > 0
    _assert_splits_add_up(record)
    peelwise.AuditReport(record, outcome.witness, outcome.probe).save(tmp_path / "out")
    assert peelwise.verify(tmp_path / "out", model, full=True).status == "holds"
    merged = merged_model(read_certificate(tmp_path / "out"), model)
    assert report_loss(merged, read_certificate(tmp_path / "out").probe) == pytest.approx(
        record.loss.composed, abs=1e-5
    )


def _assert_splits_add_up(record) -> None:
    for split in (record.loss.split, *(block.split for block in record.blocks)):
        parts = split.irreducible + split.price_of_precision + split.left_on_the_table
        assert parts == pytest.approx(record.loss.current, abs=1e-9)
    assert record.loss.split.left_on_the_table == pytest.approx(record.loss.composed_gain.mean, abs=1e-9)
    for block in record.blocks:
        assert block.split.left_on_the_table == pytest.approx(block.recoverable_nats.mean, abs=1e-9)
        for matrix in block.matrices:
            if matrix.format is None:
                assert matrix.split is None
    splits = [matrix.split for block in record.blocks for matrix in block.matrices if matrix.format is not None]
    assert any(split.price_of_precision > 0 for split in splits)  # the dense witness is in no format
    assert any(split.left_on_the_table > 0 for split in splits)
    assert not list(contradictions(record, 1e-3))


def test_a_budget_that_ends_before_anything_was_proposed_is_said() -> None:
    model = ZOO["plain"]()
    quantize_(model, "ternary:tensor", skip=())
    record = run_audit(model, tiny_probe(), replace(ONE_ROUND, budget=1e-3)).record
    assert not record.complete
    assert record.notes[-1].code == "budget-ended"
    assert not record.rounds


def test_an_audit_leaves_a_low_bit_model_as_it_was() -> None:
    model = ZOO["plain"]()
    quantize_(model, "ternary")
    before = Snapshot.of(model)
    run_audit(model, tiny_probe(), replace(ONE_ROUND, controls=False))
    before.assert_unchanged(model)


def test_weights_in_use_during_the_evaluation_are_what_the_codes_decode_to() -> None:
    model, _, outcome = _audited("llama", "ternary:tensor", ())
    changes = changes_of(outcome.witness, "composed", find_blocks(model))
    for linear, change in changes.items():
        held = linear.held()
        decoded = held.format.decode(codes_of(outcome.witness, "composed", linear, held))
        torch.testing.assert_close(held.weight + change, decoded, rtol=0, atol=0)


def test_apply_writes_a_model_of_the_same_layers_with_the_certified_loss(tmp_path) -> None:
    model = ZOO["llama"]()
    quantize_(model, "ternary")
    save_pretrained(model, tmp_path / "model")
    opened = open_model(tmp_path / "model", with_tokenizer=False)
    outcome = run_audit(opened.model, tiny_probe(), replace(ONE_ROUND, controls=False), source=opened.source)
    peelwise.AuditReport(outcome.record, outcome.witness, outcome.probe).save(tmp_path / "out")
    loss = peelwise.apply(tmp_path / "out", None, tmp_path / "better")
    assert loss == pytest.approx(outcome.record.loss.composed, abs=1e-5)
    better = open_model(tmp_path / "better", with_tokenizer=False).model
    for linear in (m for block in find_blocks(better) for m in block.linears):
        assert linear.held().format.name == "ternary:tensor"
        assert set(linear.held().encoded.codes.unique().tolist()) <= {-1, 0, 1}


def _resealed(folder, change) -> None:
    """Change the witness as a forger would who knows how certificates are sealed."""
    from peelwise.certificate.base import _witness_record

    path = folder / "witness.safetensors"
    record = read_certificate(folder).record
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    sealed = record.model_copy(update={"witness": _witness_record(path, tensors)}).sealed()
    (folder / "certificate.json").write_text(sealed.to_json() + "\n")


def _first(tensors, suffix: str) -> str:
    return next(name for name in sorted(tensors) if name.startswith("composed/") and name.endswith(suffix))


def _flip_many(tensors) -> None:
    codes = tensors[_first(tensors, "up_proj.codes")]
    codes[: len(codes) // 2] *= -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_flip_many, "was certified"),
        (lambda t: t[_first(t, "up_proj.scales")].mul_(3), "was certified"),
        (lambda t: t[_first(t, ".codes")][0].fill_(2), "code 2 is none of its 3 codes"),
        (lambda t: t.update({_first(t, ".scales"): t[_first(t, ".scales")].float()}), "expected scales .* in float16"),
        (lambda t: t.update({_first(t, ".format"): t[_first(t, ".format")][:-1]}), "holds ternary:tensor, the witness"),
        (lambda t: t.update({_first(t, ".codes")[:-6]: torch.zeros(3, 3)}), "dense: not at the same bits"),
    ],
)
def test_a_tampered_witness_or_one_outside_the_format_does_not_hold(tmp_path, change, message: str) -> None:
    model, _, outcome = _audited("llama", "ternary:tensor", ())
    folder = tmp_path / "out"
    peelwise.AuditReport(outcome.record, outcome.witness, outcome.probe).save(folder)
    assert peelwise.verify(folder, model).holds
    _resealed(folder, change)
    result = peelwise.verify(folder, model)
    assert result.status == "does not hold"
    assert re.search(message, result.reason), result.reason


def test_a_witness_of_nan_is_refused_before_anything_is_computed(tmp_path) -> None:
    model, _, outcome = _audited("llama", "ternary:tensor", ())
    folder = tmp_path / "out"
    peelwise.AuditReport(outcome.record, outcome.witness, outcome.probe).save(folder)
    _resealed(folder, lambda t: t[_first(t, ".scales")].fill_(float("nan")))
    with pytest.raises(CertificateError, match="NaN or Inf"):
        peelwise.verify(folder, model)


def test_a_module_that_cannot_be_given_codes_is_said_so(tmp_path) -> None:
    model, _, outcome = _audited("plain", "ternary:tensor", ())
    certificate = read_certificate_of(outcome, tmp_path)
    model = copy.deepcopy(model)
    find_blocks(model)[0].linears[0].module.hold_ = None
    with pytest.raises(CertificateError, match=r"cannot be given other codes.*hold_\(encoded\)"):
        merged_model(certificate, model)


def _bitnet_folder(folder) -> None:
    """A packed checkpoint, as BitNet models are published."""
    transformers = pytest.importorskip("transformers")
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    config = transformers.BitNetConfig(
        vocab_size=97, bos_token_id=None, eos_token_id=None, hidden_size=32, intermediate_size=64,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BitNetForCausalLM(config)
    weights = {}
    for name, weight in model.state_dict().items():
        if "_proj" in name:
            scale = weight.abs().mean()
            weights[name] = bitnet.pack_weights((weight / scale).round().clamp(-1, 1))
            weights[name.replace("weight", "weight_scale")] = (1 / scale).reshape(1)
        else:
            weights[name] = weight.contiguous()
    model.config.quantization_config = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    model.config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _torchao_folder(folder) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup
    from transformers import AutoModelForCausalLM, TorchAoConfig

    ZOO["llama"]().save_pretrained(folder / "dense")
    config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=TorchAoConfig(config))
    model.save_pretrained(folder)


@pytest.mark.parametrize(("make", "form"), [(_bitnet_folder, "ternary:tensor"), (_torchao_folder, "int4:group=16")])
def test_other_peoples_checkpoints_are_audited_verified_and_applied_at_their_bits(tmp_path, make, form) -> None:
    torch.manual_seed(0)
    make(tmp_path)
    with torch.compiler.set_stance("force_eager"):  # transformers compiles the unpacking of BitNet's codes
        report = peelwise.audit(
            tmp_path, tiny_probe(in_distribution=True), peelwise.AuditSettings("10m", 1, 1, controls=False)
        )
        assert any(note.code == "low-bit" and form in note.values["formats"] for note in report.record.notes)
        assert sum(name.startswith("composed/") and name.endswith(".codes") for name in report.witness) > 10
        report.save(tmp_path / "certificate")
        assert peelwise.verify(tmp_path / "certificate", tmp_path, full=True).holds
        loss = peelwise.apply(tmp_path / "certificate", tmp_path, tmp_path / "applied")
        assert loss == pytest.approx(report.record.loss.composed, abs=1e-4)
        assert abs(loss - report.record.loss.current) > 1e-7  # the control: other weights
        written = open_model(tmp_path / "applied", with_tokenizer=False).model
        assert all(m.low_bit for block in find_blocks(written) for m in block.linears)


def test_a_gguf_file_is_audited_at_the_bits_it_stores(tmp_path) -> None:
    write_llama_gguf(llama_of_whole_blocks(), tmp_path / "model.gguf", "Q4_0")
    opened = open_model(tmp_path / "model.gguf", with_tokenizer=False, as_stored=True)
    outcome = run_audit(opened.model, tiny_probe(in_distribution=True), ONE_ROUND, source=opened.source)
    certificate = read_certificate_of(outcome, tmp_path)
    assert certificate.record.model.as_stored
    assert sum(name.startswith("composed/") and name.endswith(".codes") for name in certificate.witness) > 10
    assert peelwise.verify(tmp_path / "out", full=True).holds
    save_model(merged_model(certificate, opened.model), None, tmp_path / "applied")  # the file has no tokenizer
    written = open_model(tmp_path / "applied", with_tokenizer=False).model
    assert report_loss(written, certificate.probe) == pytest.approx(outcome.record.loss.composed, abs=1e-4)
    assert all(m.held().format.name == "int4:group=32,symmetric" for b in find_blocks(written) for m in b.linears)


def read_certificate_of(outcome, tmp_path):
    peelwise.AuditReport(outcome.record, outcome.witness, outcome.probe).save(tmp_path / "out")
    return read_certificate(tmp_path / "out")


def test_a_witness_of_another_support_is_refused() -> None:
    model, _, outcome = _audited("llama-tied", "int3:minimum,band=24", ())
    linear = find_blocks(model)[0].linears[0]
    name = f"composed/{linear.name}.support"
    other = outcome.witness[name].clone()
    other[0, 0] = False
    with pytest.raises(FormatError, match="another support"):
        codes_of(outcome.witness | {name: other}, "composed", linear, linear.held())


class _Protocol(nn.Linear):
    """Somebody else's layer: says its format, and computes with weights of it."""

    format = "ternary"
    factor = 1.0

    def effective_weight(self) -> torch.Tensor:
        return self.factor * parse_format("ternary").project(self.weight.detach()) + (self.factor - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.effective_weight(), self.bias)


def _with_foreign_layer(factor: float) -> nn.Module:
    model = ZOO["llama"]()
    mlp = model.model.layers[1].mlp
    foreign = _Protocol(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False)
    foreign.weight.data, foreign.factor = mlp.up_proj.weight.data, factor
    mlp.up_proj = foreign
    return model


def test_a_module_that_follows_the_protocol_gets_a_witness_in_its_format() -> None:
    model = _with_foreign_layer(1.0)
    quantize_(model, "ternary")  # all others
    outcome = run_audit(model, tiny_probe(), replace(ONE_ROUND, controls=False))
    linear = next(m for m in find_blocks(model)[1].linears if m.name.endswith("up_proj"))
    encoded = codes_of(outcome.witness, "composed", linear, linear.held())
    check_member(encoded, parse_format("ternary"), tuple(linear.weight().shape))


def test_a_module_that_does_not_store_its_format_is_named() -> None:
    with pytest.raises(FormatError, match=r"model.layers.1.mlp.up_proj: The weights do not obey ternary"):
        run_audit(_with_foreign_layer(1.1), tiny_probe(), ONE_ROUND)


@pytest.mark.parametrize("form", ["ternary:channel", pytest.param("int4:minimum", marks=pytest.mark.nightly)])
def test_rows_of_zeros_and_constant_rows_are_handled(form: str) -> None:
    model = ZOO["llama"]()
    quantize_(model, form)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[:3] = 0.0
            block.mlp.down_proj.weight[:3] = 0.01
            block.self_attn.q_proj.weight.zero_()
    record = run_audit(model, tiny_probe(), replace(ONE_ROUND, controls=False)).record
    _assert_splits_add_up(record)
