"""Peels of low-bit models: references are codes and scales of the same formats, at every moment and in the file."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from dataclasses import replace
from functools import cache
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import peelwise
from audits import Snapshot, part_of, runner_of, tiny_probe
from peelwise.certificate.base import WITNESS_FILE
from peelwise.certificate.peel import reference_stack
from peelwise.engine.witness import codes_of
from peelwise.errors import CertificateError
from peelwise.formats.membership import check_member
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoints import open_model
from peelwise.model.fresh import fresh_copy
from peelwise.nn import quantize_
from peelwise.nn.linear import QuantizedLinear
from peelwise.records.files import RECORD_FILE
from peelwise.records.peel import REFERENCE_FORMATS, PeelRecord
from peelwise.tasks.peel.fit import FitOptions, fit_block
from peelwise.tasks.peel.reference_block import EFFECTIVE, ReferenceBlock, State
from peelwise.tasks.peel.run import run_peel
from peelwise.tasks.peel.settings import PeelSettings
from stages import CHECKPOINTS
from tasks.audit.test_low_bit import _bitnet_folder
from zoo import ZOO

from .test_fit import target_of, traces_of

ONE_MAP = PeelSettings(600.0, maps=((1, 3, 3),), rounds=1, controls=False)
KINDS = [
    ("llama", "ternary:tensor", ()),
    ("plain", "binary:model", ()),
    ("qwen2", "int2:group=16,affine", ("down_proj",)),  # biases, and dense maps among low-bit ones
    ("llama-tied", "int4:minimum,band=24", ()),
]


def low_bit_model(name: str, form: str, skip: tuple[str, ...] = ()):
    model = ZOO[name]()
    quantize_(model, form, skip=skip)
    return model


@cache
def peeled(name: str, form: str, skip: tuple[str, ...]):
    model = low_bit_model(name, form, skip)
    before = Snapshot.of(model)
    outcome = run_peel(model, tiny_probe(), ONE_MAP)
    before.assert_unchanged(model)
    return model, peelwise.PeelReport(outcome.record, outcome.witness, outcome.probe)


@pytest.mark.parametrize(("name", "form", "skip"), KINDS)
def test_references_are_inside_the_formats_and_are_certified(tmp_path, name, form, skip):
    model, report = peeled(name, form, skip)
    low_bit = [m for block in find_blocks(model) for m in block.linears if m.low_bit]
    flipped = 0
    for linear in low_bit:
        held = linear.held()
        assert not {f"stack/{linear.name}.{kind}" for kind in ("weight", EFFECTIVE)} & report.witness.keys()
        encoded = codes_of(report.witness, "stack", linear, held)
        if encoded is not None:
            check_member(encoded, held.format, tuple(held.weight.shape))
            flipped += int((encoded.codes != held.encoded.codes).sum())
    assert flipped > 0
    formats = {linear.held().format.name for linear in low_bit}
    assert report.record.reference_formats == ", ".join(formats)
    assert f"references inside {formats.pop()}" in " ".join(str(report).split())
    result = peelwise.verify(report.save(tmp_path / "out"), model)
    assert result.holds, result.reason
    assert any(said.startswith("that references are inside") for said in result.rechecked)
    assert "references" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(("name", "form", "skip"), KINDS)
def test_real_low_bit_layers_that_hold_the_codes_reach_the_same_loss(name, form, skip):
    model, report = peeled(name, form, skip)
    built = copy.deepcopy(model)
    parameters = dict(built.named_parameters())
    for block in find_blocks(built):
        for linear in block.linears:
            encoded = codes_of(report.witness, "stack", linear, linear.held()) if linear.low_bit else None
            if encoded is not None:
                linear.module.hold_(encoded)
    with torch.no_grad():
        for key, change in report.witness.items():
            if (name := key.removeprefix("stack/")) in parameters and name != key:
                parameters[name].add_(change.float())
    loss = runner_of(built).trace(report.probe.report).mean
    assert loss == pytest.approx(report.record.maps[0].own_head.report, abs=1e-5)
    assert loss != pytest.approx(report.record.loss.current, abs=1e-4)


@pytest.mark.parametrize("start", ["warm", "cold"])
def test_every_state_that_is_ever_in_place_is_inside(start, monkeypatch):
    seen = []
    put = ReferenceBlock.set

    def watched(self, state):
        put(self, state)
        for linear, held in self.held.items():
            encoded = self.codes(linear)
            check_member(encoded, held.format, tuple(held.weight.shape))
            own = next(m for m in self.own.linears if m.name == linear.name)
            assert torch.equal(own.held().encoded.codes, held.encoded.codes)  # the model's stay
            with torch.no_grad():
                x = torch.eye(held.weight.shape[1])
                torch.testing.assert_close(linear.module(x).T, held.format.decode(encoded), rtol=1e-6, atol=1e-6)
        assert not any(name.endswith((f".{EFFECTIVE}", "_proj.weight")) for name in state.changes)
        seen.append(state)

    monkeypatch.setattr(ReferenceBlock, "set", watched)
    model = low_bit_model("llama", "ternary")
    runner, traces = traces_of(model)
    reference = ReferenceBlock(runner.blocks[0])
    if start == "cold":
        reference.set(reference.initialised(find_blocks(fresh_copy(model, 1))[0]))
    fit_block(runner, reference, traces["fit"], traces["select"], target_of(traces, 3), FitOptions(1))
    assert len(seen) > 10
    assert reference.state.codes


@pytest.mark.parametrize(("name", "form", "skip"), KINDS[1:3])
def test_the_error_on_select_never_rises(name, form, skip):
    runner, traces = traces_of(low_bit_model(name, form, skip))
    errors = []
    for options in (FitOptions(1, steps=False), FitOptions(2)):
        reference = ReferenceBlock(runner.blocks[0])
        fitted = fit_block(runner, reference, traces["fit"], traces["select"], target_of(traces, 3), options)
        assert fitted.select_error <= fitted.start_error
        errors.append(fitted.select_error)
    assert fitted.start_error > errors[0] >= errors[1]


def test_the_direct_map_is_the_model_and_dense_references_may_leave_the_formats(tmp_path):
    model, inside = peeled(*KINDS[0])
    maps = ((1, 2, 3), (1, 3, 3))
    outcome = run_peel(model, tiny_probe(), replace(ONE_MAP, maps=maps, dense_references=True))
    direct = next(m for m in outcome.record.maps if m.name == "direct")
    assert direct.own_head.report == outcome.record.loss.current
    assert outcome.record.reference_formats is None
    assert any(note.code == "dense-references" for note in outcome.record.notes)
    free = next(m for m in outcome.record.maps if m.name != "direct")
    assert free.unexplained[1] < inside.record.maps[0].unexplained[1]  # what the bits cost
    report = peelwise.PeelReport(outcome.record, outcome.witness, outcome.probe)
    assert peelwise.verify(report.save(tmp_path / "out"), model).holds


def test_packed_weights_of_others_are_peeled_at_their_bits(tmp_path):
    """Layers that cannot be given a weight compute with what is added behind them."""
    torch.manual_seed(0)
    _bitnet_folder(tmp_path)
    with torch.compiler.set_stance("force_eager"):  # transformers compiles the unpacking of the codes
        report = peelwise.peel(tmp_path, tiny_probe(), ONE_MAP)
        assert report.record.reference_formats == "ternary:tensor,scale=float32"
        assert sum(name.endswith(".codes") for name in report.witness) > 3
        assert report.record.loss.bound != report.record.loss.current
        assert peelwise.verify(report.save(tmp_path / "certificate"), tmp_path).holds


def test_a_stack_of_changed_latent_weights_is_still_read():
    """Certificates of before hold changes of latent weights, which the layers round as they always do."""
    model = low_bit_model("llama", "ternary")
    blocks = find_blocks(model)
    name = "model.layers.1.mlp.down_proj"
    linear = next(m for m in blocks[1].linears if m.name == name)
    change = (0.3 * torch.randn(linear.weight().shape, generator=torch.Generator().manual_seed(0))).bfloat16()
    stack = reference_stack({f"stack/{name}.weight": change}, blocks)
    (moved,) = (m for m in stack[1].block.linears if m.name == name)
    expected = linear.held().format.project(linear.module.weight.detach() + change.float())
    assert torch.equal(moved.weight(), expected)
    assert not torch.equal(moved.weight(), linear.weight())
    assert all(reference.state == State() for reference in (stack[0], stack[2]))


# -- certificates ----------------------------------------------------------------------------------------------


def forged(folder, change):
    """Write another witness or record and seal it, as somebody would who knows how."""
    witness, content = load_file(folder / WITNESS_FILE), json.loads((folder / RECORD_FILE).read_text())
    change(witness, content)
    save_file(witness, folder / WITNESS_FILE)
    written = (folder / WITNESS_FILE).read_bytes()
    content["witness"] |= {"sha256": hashlib.sha256(written).hexdigest(), "bytes": len(written)}
    (folder / RECORD_FILE).write_text(PeelRecord.model_validate(content).sealed().to_json())


def first(witness, suffix):
    return next(name for name in sorted(witness) if name.startswith("stack/") and name.endswith(suffix))


def flip_some(witness, _):
    codes = witness[first(witness, "down_proj.codes")]
    codes[: len(codes) // 4] *= -1


def go_dense(witness, _):
    name = first(witness, "down_proj.codes").removesuffix(".codes")
    shape = witness[f"{name}.codes"].shape
    for part in ("codes", "scales", "format"):
        witness.pop(f"{name}.{part}")
    witness[f"{name}.{EFFECTIVE}"] = torch.zeros(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_some, "was certified"),
        (lambda w, _: w[first(w, "down_proj.scales")].mul_(3), "was certified"),
        (lambda w, _: w[first(w, ".codes")][0].fill_(2), "code 2 is none of its 3 codes"),
        (lambda w, _: w.update({first(w, ".scales"): w[first(w, ".scales")].float()}), "expected scales .* in float16"),
        (go_dense, "its reference is dense: not at the same bits"),
        (lambda _, c: c["settings"].update({REFERENCE_FORMATS: "binary:channel"}), "said to be inside binary:channel"),
    ],
)
def test_a_tampered_stack_or_one_outside_the_formats_does_not_hold(tmp_path, change, message):
    model, report = peeled(*KINDS[0])
    folder = report.save(tmp_path / "out")
    forged(folder, change)
    result = peelwise.verify(folder, model)
    assert result.status == "does not hold"
    assert re.search(message, result.reason), result.reason


def test_scales_without_codes_are_named(tmp_path):
    model, report = peeled(*KINDS[0])
    folder = report.save(tmp_path / "out")
    forged(folder, lambda witness, _: witness.pop(first(witness, ".codes")) is None)
    with pytest.raises(CertificateError, match=r"the model's blocks do not have"):
        peelwise.verify(folder, model)


# -- theorem with its control ----------------------------------------------------------------------------------

DIRECT, PAST_THE_DAMAGE = (1, 2, 3, 4, 5, 6), (1, 2, 3, 5, 5, 6)


@pytest.fixture(scope="module")
def ternary():
    return open_model(CHECKPOINTS.parent / "low_bit" / "ternary-tuned", device="cpu", with_tokenizer=False).model


@pytest.fixture(scope="module")
def help_probe():
    """Training text that needs no reading of the whole library."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHECKPOINTS / "tokenizer")
    texts = [topics[name][:1_500] for name in sorted(topics)[::2]]
    return part_of(peelwise.Probe.from_text(texts, tokenizer, tokens=9_000), fit=12, select=6, report=26)


@pytest.mark.parametrize("damaged", [True, False])
def test_flipped_codes_are_found_at_the_same_bits_and_a_healthy_model_is_not_beaten(damaged, ternary, help_probe):
    model = copy.deepcopy(ternary)
    if damaged:
        for layer in (model.model.layers[3].self_attn.o_proj, model.model.layers[3].mlp.down_proj):
            assert isinstance(layer, QuantizedLinear)
            encoded = layer.encoded()
            layer.hold_(replace(encoded, codes=-encoded.codes))
    settings = PeelSettings(600.0, maps=(DIRECT, PAST_THE_DAMAGE), rounds=1, controls=False)
    record = run_peel(model, help_probe, settings).record
    assert record.reference_formats == "ternary:tensor"
    over = next(m.gain_over_head for m in record.maps if m.stations == PAST_THE_DAMAGE)
    if damaged:
        assert record.best_map == PAST_THE_DAMAGE
        assert record.loss.certified.low > 0
    else:
        assert record.best_map == DIRECT
        assert over.high < 0
