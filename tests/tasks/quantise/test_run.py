"""A model in a low-bit format: better than rounding, the parent untouched, and an interrupted run goes on."""

from __future__ import annotations

import html
import json

import pytest
import torch
import transformers
from torch import nn

import peelwise
from audits import Snapshot, part_of, tiny_probe
from peelwise.errors import FormatError, ModelError, OptionError, OutputError
from peelwise.formats.table import parse_format
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoints import open_model
from peelwise.model.weights.table import held
from peelwise.nn import dense_
from peelwise.records.quantise import QuantiseRecord
from peelwise.show.html.prices import within
from peelwise.show.quantise.report import render_html
from peelwise.show.quantise.words import conclusion
from peelwise.tasks.quantise.kept import Kept
from peelwise.tasks.quantise.run import run_quantise
from peelwise.tasks.quantise.settings import QuantiseSettings
from zoo import VOCABULARY, ZOO

QUICK = QuantiseSettings("int3", max_sweeps=1)


def quantised(model, settings=QUICK, kept=None, probe=None, watcher=None):
    return run_quantise(model, "small", None, probe or tiny_probe(), settings, watcher, kept)


@pytest.mark.nightly
def test_codes_of_a_trained_model_lose_less_than_half_of_what_rounding_does(small_gpt, training_probe):
    model, _ = small_gpt("final")
    probe = part_of(training_probe, fit=20, select=6, report=20)
    before = Snapshot.of(model)
    found = quantised(model, probe=probe)
    before.assert_unchanged(model)
    loss = found.record.loss
    assert loss.recovered.low > 0
    assert loss.damage.mean < 0.5 * loss.rounding_damage.mean
    assert found.record.conclusion.case == "better-than-rounding"
    # Each part of the method pays on the same tokens: without it more is lost.
    for without in ({"asymmetric": False, "curvature": False}, {"curvature": False}):
        less = quantised(model, QuantiseSettings("int3", max_sweeps=1, **without), probe=probe).record.loss
        assert less.damage.mean > loss.damage.mean
    assert QuantiseRecord.model_validate_json(found.record.to_json()) == found.record


def test_the_model_returned_is_the_one_that_was_measured(small_gpt, training_probe, tmp_path):
    model, _ = small_gpt("middle")
    probe = part_of(training_probe, fit=12, select=4, report=8)
    report = peelwise.quantise(model, probe, QUICK, out=tmp_path / "int3")
    made = open_model(tmp_path / "int3", device="cpu", with_tokenizer=False).model
    ids, mask = probe.report.ids, probe.report.mask
    for each in (report.quantised(), made):
        with torch.no_grad():
            logits = each(ids[:, :-1]).logits
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        mean = float((losses * mask[:, 1:]).sum() / mask[:, 1:].sum())
        assert mean == pytest.approx(report.record.loss.quantised, abs=1e-4)
    assert json.loads((tmp_path / "int3" / "quantise.json").read_text())["kind"] == "quantise"
    page, drawn = ((tmp_path / "int3" / name).read_text() for name in ("report.html", "layers.svg"))
    assert page == render_html(report.record)
    assert drawn in page
    assert drawn.count("<g><title>block ") == len(report.record.layers)
    for layer in report.record.layers:
        row = f'<th scope="row">{within(layer.name, layer.block)}</th><td>{layer.block}</td>'
        assert page.count(row) == 1
    assert html.escape(conclusion(report.record)) in page
    assert not (tmp_path / ".int3.unfinished").exists()
    assert conclusion(report.record) in " ".join(str(report).split())


@pytest.mark.parametrize("kind", ["gpt2", "neox-parallel", "qwen2", "gemma3", "mixtral"])
@pytest.mark.parametrize("form", ["int4:group=16", "ternary:channel"])
def test_any_architecture(kind, form):
    model = ZOO[kind]()
    before = Snapshot.of(model)
    record = quantised(model, QuantiseSettings(form, max_sweeps=1)).record
    before.assert_unchanged(model)
    assert all(layer.format == parse_format(form).name for layer in record.layers)
    assert (kind == "mixtral") == any(".experts." in layer.name for layer in record.layers)
    assert not record.skipped


def test_a_conv1d_is_quantised_saved_and_opened_as_it_was_measured(tmp_path):
    """GPT-2 keeps its matrices as [inputs, outputs], and so do the files."""
    model, probe = ZOO["gpt2"]().eval(), tiny_probe()
    report = peelwise.quantise(model, probe, QuantiseSettings("int4:group=16", max_sweeps=1), out=tmp_path / "out")
    assert any(name.endswith("attn.c_attn") for name in report.codes)
    made = open_model(tmp_path / "out", device="cpu", with_tokenizer=False).model
    ids, mask = probe.report.ids, probe.report.mask
    for each in (report.quantised(), made):
        for name, (form, encoded) in report.codes.items():
            layer = each.get_submodule(name)
            assert layer.weight.shape == model.get_submodule(name).weight.shape
            assert torch.equal(layer.effective_weight(), form.decode(encoded))
            assert torch.equal(held(layer).latent, layer.weight.T)
        with torch.no_grad():
            logits = each(ids[:, :-1]).logits
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        mean = float((losses * mask[:, 1:]).sum() / mask[:, 1:].sum())
        assert mean == pytest.approx(report.record.loss.quantised, abs=1e-4)
    names = dense_(made)
    assert set(names) == set(report.codes)
    plain = made.get_submodule(names[0])
    assert type(plain) is type(model.get_submodule(names[0]))
    with torch.no_grad():
        torch.testing.assert_close(made(ids[:, :-1]).logits, logits)


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_experts_are_quantised_and_saved_as_the_floats_they_stand_for(tmp_path, kind):
    model, probe = ZOO[kind]().eval(), tiny_probe()
    before = Snapshot.of(model)
    report = peelwise.quantise(model, probe, QuantiseSettings("int4:group=16", max_sweeps=1), out=tmp_path / "out")
    before.assert_unchanged(model)
    experts = [name for name in report.codes if ".experts." in name]
    assert len(experts) == 3 * 4 * 2  # blocks, experts, parameters of each
    drawn = (tmp_path / "out" / "layers.svg").read_text()
    assert drawn.count("the most of 4 experts") == 3 * 2
    assert drawn.count("<g><title>block ") == len(report.codes) - len(experts) + 3 * 2
    made = open_model(tmp_path / "out", device="cpu", with_tokenizer=False).model
    ids, mask = probe.report.ids, probe.report.mask
    for each in (report.quantised(), made):
        by_name = {linear.name: linear for block in find_blocks(each) for linear in block.linears}
        for name in experts:
            form, encoded = report.codes[name]
            assert torch.equal(by_name[name].weight(), form.decode(encoded))
        with torch.no_grad():
            logits = each(ids[:, :-1]).logits
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        mean = float((losses * mask[:, 1:]).sum() / mask[:, 1:].sum())
        assert mean == pytest.approx(report.record.loss.quantised, abs=1e-4)
    for skipped in (("down_proj",), (experts[0],)):
        left = quantised(model, QuantiseSettings("int4:group=16", skipped, max_sweeps=0)).record.skipped
        assert left
        assert set(left) == {name for name in report.codes if name == skipped[0] or f".{skipped[0]}" in name}


def test_experts_that_get_no_token_are_rounded():
    model = ZOO["mixtral"]()
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data.zero_()  # all experts are as good as each other, so the same two get every token
    found = quantised(model, QuantiseSettings("int4:group=16", max_sweeps=1))
    by_name = {linear.name: linear for block in find_blocks(model) for linear in block.linears}
    unseen = [layer for layer in found.record.layers if not layer.steps]
    assert len(unseen) == 3 * 2 * 2
    for layer in unseen:
        form, encoded = found.codes[layer.name]
        assert torch.equal(encoded.codes, form.encode(by_name[layer.name].weight()).codes)
        assert f">{within(layer.name, layer.block)}<" in render_html(found.record)
    assert all(layer.flipped > 0 for layer in found.record.layers if layer.steps)


def test_single_layers_can_be_skipped_or_planned():
    model = ZOO["llama"]()
    name = "model.layers.1.mlp.up_proj"
    settings = QuantiseSettings("int3", ("down_proj", "model.layers.0.self_attn.q_proj"), 0, plan={name: "int8"})
    record = quantised(model, settings).record
    formats = {layer.name: layer.format for layer in record.layers}
    assert formats[name] == parse_format("int8").name
    assert not any(each.endswith("down_proj") for each in formats)
    assert "model.layers.0.self_attn.q_proj" in record.skipped
    bits = [(layer.bits_per_weight, layer.weights) for layer in record.layers]
    assert record.bits_per_weight == pytest.approx(sum(b * w for b, w in bits) / sum(w for _, w in bits))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: QuantiseSettings("int99"), FormatError, "int99"),
        (lambda: QuantiseSettings(max_sweeps=-1), OptionError, "max_sweeps"),
        (lambda: QuantiseSettings(plan={"x": "nothing"}), FormatError, "nothing"),
        (lambda: quantised(ZOO["llama"](), QuantiseSettings(skip=("nowhere",))), FormatError, "nowhere"),
        (lambda: quantised(ZOO["llama"](), QuantiseSettings(plan={"no.layer": "int4"})), FormatError, "no.layer"),
        (lambda: quantised(ZOO["llama"](), QuantiseSettings("int4:group=7")), FormatError, "does not divide"),
        (lambda: quantised(ZOO["llama"](), QuantiseSettings("dense")), FormatError, "left to quantise"),
        (lambda: peelwise.quantise(ZOO["llama"](), tiny_probe(), to="gguf"), OutputError, "opened from"),
        (lambda: peelwise.quantise(ZOO["llama"](), tiny_probe(), to="pdf"), OptionError, "pdf"),
    ],
)
def test_bad_input_is_a_sentence(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("product", [peelwise.quantise, peelwise.allocate])
def test_weights_of_nan_are_named_with_a_remedy_that_fits(product):
    model = ZOO["llama"]()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    with pytest.raises(
        ModelError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 of .* NaN or Inf\. Give a checkpoint w"
    ):
        product(model, tiny_probe())


def test_zeros_do_no_harm():
    model = ZOO["llama"]()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:3] = 0
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    record = quantised(model, QuantiseSettings("int4:group=16", max_sweeps=1)).record
    assert all(torch.isfinite(torch.tensor(list(layer.steps.values()))).all() for layer in record.layers)


def test_fewer_tokens_than_inputs_are_said():
    few = part_of(tiny_probe(), fit=3)
    (said,) = (n for n in quantised(ZOO["llama"](), probe=few).record.notes if n.code == "few-fit-tokens")
    assert said.values["tokens"] == 48 < said.values["inputs"] == 80
    assert said.values["more"] == sum(".down_proj" in n for n, _ in ZOO["llama"]().named_modules()) - 1
    assert not any(n.code == "few-fit-tokens" for n in quantised(ZOO["llama"]()).record.notes)


class StopHereError(Exception):
    pass


def test_an_interrupted_run_goes_on_where_it_ended(tmp_path):
    model, whole = ZOO["llama"](), quantised(ZOO["llama"]())
    key, solved = {"run": 1}, []

    def stop(step):
        if step.stage == "codes" and step.done == 2:
            raise StopHereError

    with pytest.raises(StopHereError):
        quantised(model, kept=Kept(tmp_path / "kept", key), watcher=stop)
    files = sorted(file.name for file in (tmp_path / "kept").iterdir())
    assert files == ["block-0000.safetensors", "block-0001.safetensors"]
    again = quantised(model, kept=Kept(tmp_path / "kept", key), watcher=solved.append)
    assert again.record.loss == whole.record.loss
    for name, (_, encoded) in whole.codes.items():
        assert torch.equal(again.codes[name][1].codes, encoded.codes)

    # What is of another run or damaged is not used.
    assert Kept(tmp_path / "kept", {"run": 2}).get(0) is None
    (tmp_path / "kept" / "block-0001.safetensors").write_bytes(b"\x00" * 100)
    assert Kept(tmp_path / "kept", key).get(1) is None
    assert Kept(tmp_path / "kept", key).get(0) is not None
    assert quantised(model, kept=Kept(tmp_path / "kept", key)).record.loss == whole.record.loss


@pytest.mark.parametrize(
    ("product", "settings"),
    [
        (peelwise.quantise, QuantiseSettings("int3", max_sweeps=0, curvature=False)),
        (peelwise.allocate, peelwise.AllocateSettings(8.0, ("int3", "int4"), points=0)),
    ],
)
def test_beginning_anew_uses_and_leaves_nothing_of_an_interrupted_run(tmp_path, product, settings):
    def stop(step):
        if step.stage == "codes" and step.done == 1:
            raise StopHereError

    out, model = tmp_path / "out", ZOO["llama"]()
    with pytest.raises(StopHereError):
        product(model, tiny_probe(), settings, out=out, progress=stop)
    (unfinished,) = tmp_path.iterdir()
    assert [file.name for file in unfinished.iterdir()] == ["block-0000.safetensors"]
    product(model, tiny_probe(), settings, out=out, resume=False)
    assert list(tmp_path.iterdir()) == [out]


def test_the_folder_of_an_earlier_result_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    for force in (False, True):
        with pytest.raises(OutputError):
            peelwise.quantise(ZOO["llama"](), tiny_probe(), QUICK, out=tmp_path / "out", force=force)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_layers_of_a_class_that_may_compute_something_else_are_named() -> None:
    """Falcon's own subclass of ``nn.Linear``; nothing else is in its blocks."""
    config = transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=48
    )
    model = transformers.FalconForCausalLM(config).eval()
    with pytest.raises(FormatError, match=r"left to quantise inside the blocks; FalconLinear may compute"):
        peelwise.quantise(model, tiny_probe(), peelwise.QuantiseSettings("int4:channel"))
