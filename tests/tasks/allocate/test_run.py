"""Bits where they matter: better than one format for all, within the budget, in tools' syntax."""

from __future__ import annotations

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch

import peelwise
from audits import Snapshot, part_of, tiny_probe
from damage import scale
from peelwise.api.allocate import read_plan
from peelwise.errors import FormatError, OptionError, OutputError
from peelwise.formats.table import parse_format
from peelwise.records.allocation import AllocationRecord
from peelwise.show.allocate import report as allocate_report
from peelwise.show.allocate import words as allocate_words
from peelwise.tasks.allocate import run
from zoo import ZOO

SMALL = ("int2:group=16", "int4:group=16")
FORMATS = ("int2:group=32", "int3:group=32", "int4:group=32")


@pytest.fixture(scope="module")
def allocated(stored_stage, training_probe):
    """Of a model one block of which hardly writes, so that its bits are of more use elsewhere."""
    model = scale(stored_stage("final")[0], 2, 0.02)
    before = Snapshot.of(model)
    report = peelwise.allocate(
        model, part_of(training_probe, fit=20, select=6, report=16), peelwise.AllocateSettings(3.5, FORMATS, points=1)
    )
    before.assert_unchanged(model)
    return report


def test_the_plan_is_within_the_budget_and_better_than_one_format_for_all(allocated):
    record = allocated.record
    assert record.bits_per_weight <= 3.5
    assert record.chosen in ("predicted", "corrected")
    assert record.better_than[parse_format("int3:group=32").name].low > 0
    assert {point.name for point in record.curve if point.kind == "uniform"} == {parse_format(f).name for f in FORMATS}
    bits = sum(layer.bits_per_weight * layer.weights for layer in record.layers)
    assert bits / sum(layer.weights for layer in record.layers) == pytest.approx(record.bits_per_weight)
    assert sum(layer.share for layer in record.layers) == pytest.approx(1)
    assert AllocationRecord.model_validate_json(record.to_json()) == record


def test_a_block_that_hardly_writes_gets_fewer_bits_than_the_others(allocated):
    def bits(layers):
        return sum(layer.bits_per_weight * layer.weights for layer in layers) / sum(layer.weights for layer in layers)

    layers = allocated.record.layers
    own, others = ([layer for layer in layers if (layer.block == 2) == it] for it in (True, False))
    assert bits(own) < bits(others) - 0.5


def test_layers_that_share_their_input_decide_together(allocated):
    groups = {}
    for layer in allocated.record.layers:
        groups.setdefault(layer.group, set()).add((layer.name.rpartition(".")[2], layer.format))
    kinds = [{name for name, _ in group} for group in groups.values()]
    assert {"q_proj", "k_proj", "v_proj"} in kinds
    assert {"gate_proj", "up_proj"} in kinds
    assert all(len({form for _, form in group}) == 1 for group in groups.values())


@pytest.mark.nightly
def test_a_block_that_hardly_writes_gets_fewer_bits_than_in_the_healthy_model(stored_stage, training_probe):
    """Its errors matter less; the healthy model is the control."""
    model, _ = stored_stage("final")
    probe = part_of(training_probe, fit=12, select=4, report=4)
    settings = peelwise.AllocateSettings(3.0, FORMATS, points=0)

    def bits_of_block(subject):
        layers = [layer for layer in peelwise.allocate(subject, probe, settings).record.layers if layer.block == 2]
        return sum(layer.bits_per_weight * layer.weights for layer in layers) / sum(layer.weights for layer in layers)

    assert bits_of_block(scale(model, 2, 0.02)) < bits_of_block(model)


def test_the_plan_is_what_quantise_takes(allocated, stored_stage, training_probe, tmp_path):
    model, _ = stored_stage("final")
    allocated.save(tmp_path / "plan")
    page, drawn = ((tmp_path / "plan" / name).read_text() for name in ("report.html", "layers.svg"))
    # Formats differ by less than a bit with their scales: in whole bits three and four would both be called 4.
    told = {each.removesuffix(".0") for each in re.findall(r'text-anchor="middle">(\d+\.\d|16)</text>', drawn)}
    assert told == {f"{layer.bits_per_weight:.1f}".removesuffix(".0") for layer in allocated.record.layers}
    assert page == allocate_report.render_html(allocated.record)
    assert drawn in page
    assert drawn.count("<g><title>block ") == len(allocated.record.layers)
    assert all(f"<h3>{name}</h3>" in page for name in allocated.exports())
    plan = read_plan(tmp_path / "plan")
    assert plan == allocated.plan == read_plan(tmp_path / "plan" / "allocation.json")
    (tmp_path / "own.json").write_text(json.dumps(plan))
    assert read_plan(tmp_path / "own.json") == plan
    settings = peelwise.QuantiseSettings(plan=plan, max_sweeps=0)
    made = peelwise.quantise(model, part_of(training_probe, fit=12, select=4, report=8), settings)
    assert {layer.name: layer.format for layer in made.record.layers} == plan
    assert made.record.bits_per_weight == pytest.approx(allocated.record.bits_per_weight)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: peelwise.AllocateSettings(-1.0), OptionError, "bits"),
        (lambda: peelwise.AllocateSettings(3.0, ("int4",)), OptionError, "two different"),
        (lambda: peelwise.AllocateSettings(3.0, ("int4", "int4:channel")), OptionError, "two different"),
        (lambda: peelwise.AllocateSettings(3.0, ("int4", "int99")), FormatError, "int99"),
        (lambda: peelwise.AllocateSettings(3.0, ("dense", "dense:float16")), OptionError, "fewer bits than dense"),
        (
            lambda: peelwise.allocate(ZOO["llama"](), tiny_probe(), peelwise.AllocateSettings(1.0, ("int2", "int4"))),
            FormatError,
            r"int2:channel,symmetric takes 2\.\d+ bits per weight with its scales, the budget is 1, .* --bits",
        ),
    ],
)
def test_bad_input_is_a_sentence(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 3}', '{"layers": [{"name": "x"}]}'])
def test_no_plan_is_a_sentence(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(OutputError, match="plan"):
        read_plan(tmp_path / "plan.json")


def onnx_node(name, kind="MatMul", scopes=None):
    kept = [SimpleNamespace(key="pkg.torch.onnx.name_scopes", value=str(scopes))] if scopes else []
    return SimpleNamespace(name=name, op_type=kind, metadata_props=kept)


def test_texts_for_other_tools_say_the_plan(allocated, stored_stage):
    record = allocated.record
    first = record.layers[0]
    left = record.model_copy(
        update={"layers": (first.model_copy(update={"format": "dense:float32"}), *record.layers[1:])}
    )
    from peelwise.show.allocate.exports import exports

    texts = exports(left)
    assert json.loads(texts["transformers.json"]) == {"modules_to_not_convert": [first.name, "lm_head"]}
    space = {}
    exec(texts["onnx_nodes.py"], space)
    assert space["LAYERS"] == [first.name, "lm_head"]
    path = first.name.replace("layers.0", "layers#0").replace(".", "/").replace("#", ".")
    other = record.layers[1].name
    nodes = [
        # as PyTorch's exporter has them, and as exporters that make the path the name
        onnx_node("node_linear", scopes=["", "model", first.name, "linear"]),
        onnx_node("node_linear_1", scopes=["", "model", other, "linear_1"]),
        onnx_node(f"/wrapped/{path}/MatMul"),
        onnx_node("/lm_head/MatMul"),
        onnx_node(f"/{path}/Add", "Add"),
        onnx_node("MatMul_7"),
    ]
    found = space["nodes_to_exclude"](SimpleNamespace(graph=SimpleNamespace(node=nodes)))
    assert found == ["node_linear", f"/wrapped/{path}/MatMul", "/lm_head/MatMul"]
    lines = texts["llama-cpp.txt"].split(" \\\n")
    assert len(lines) == len(record.layers)
    assert f"--tensor-type blk.{first.block}.attn_q.weight=f16" in lines
    yaml = pytest.importorskip("yaml")
    stage = yaml.safe_load(texts["llm-compressor.yaml"])["quantization_stage"]["quantization_modifiers"]["GPTQModifier"]
    assert stage["ignore"] == ["lm_head", first.name]
    said = {
        name: (group["weights"]["num_bits"], group["weights"]["group_size"])
        for group in stage["config_groups"].values()
        for name in group["targets"]
    }
    for layer in record.layers[1:]:
        assert said[layer.name] == (int(layer.format[3]), 32)


def test_torchao_takes_its_configuration(allocated, stored_stage):
    pytest.importorskip("torchao.quantization")
    from torchao.quantization import quantize_

    model, space = copy.deepcopy(stored_stage("final")[0]), {}
    exec(allocated.exports()["torchao_config.py"], space)
    before = {
        name: module.weight.detach().clone() for name, module in model.named_modules() if hasattr(module, "weight")
    }
    quantize_(model, space["config"], filter_fn=None)
    for layer in allocated.record.layers:
        weight = model.get_submodule(layer.name).weight
        assert type(weight) is not torch.nn.Parameter
        form = parse_format(layer.format)
        plain = before[layer.name]
        steps = (weight.dequantize() - plain).abs() / form.encode(plain).scales.float().repeat_interleave(32, 1)
        assert float(steps.max()) < 1.2  # it is in steps of that many bits
        assert float(steps.max()) > 0.3


def test_terminal_and_notebook_show_the_plan_among_the_curve(allocated):
    rows = allocate_words.curve_rows(allocated.record)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert len(rows) == len(allocated.record.curve) + 1
    for shown in (str(allocated), allocated._repr_html_()):
        assert shown.count("this plan") == 1
        assert allocated.conclusion.split(";")[0] in " ".join(shown.split())


def test_formats_of_tables_and_super_blocks_are_named_as_llama_cpp_names_them(allocated):
    from peelwise.show.allocate.exports import exports

    record = allocated.record
    forms = ["q4_k", "nf4:group=64", "float8_e4m3:channel,scale=float32"]
    changed = [
        layer.model_copy(update={"format": forms[i % 3]} if i < 3 else {}) for i, layer in enumerate(record.layers)
    ]
    texts = exports(record.model_copy(update={"layers": tuple(changed)}))
    lines = texts["llama-cpp.txt"].split(" \\\n")
    assert [line.rpartition("=")[2].strip() for line in lines[:3]] == ["q4_K", "iq4_nl", "q8_0"]
    assert [changed[i].name for i in range(3)] == json.loads(texts["transformers.json"])["modules_to_not_convert"][:3]


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("stage", ["codes", "block-formats"])
def test_an_interrupted_plan_goes_on_where_it_ended(tmp_path, monkeypatch, stage):
    model, probe, settings = ZOO["mixtral"](), tiny_probe(), peelwise.AllocateSettings(3.4, SMALL, points=0)
    whole, made, measured = peelwise.allocate(model, probe, settings).record, [], []
    groups_of, damage = run.groups_of, run._damage
    monkeypatch.setattr(run, "groups_of", lambda *args: made.append(args[1].index) or groups_of(*args))
    monkeypatch.setattr(run, "_damage", lambda *args: measured.append(args[3]) or damage(*args))

    def stop(step):
        if step.stage == stage and step.done == 2:
            raise StopHereError

    with pytest.raises(StopHereError):
        peelwise.allocate(model, probe, settings, out=tmp_path / "plan", progress=stop)
    assert not (tmp_path / "plan").exists()
    before = made[:], measured[:]
    again = peelwise.allocate(model, probe, settings, out=tmp_path / "plan").record
    assert made == [0, 1, 2] == [*before[0], *made[len(before[0]) :]]  # no block twice
    assert measured == [0] * 2 + [1] * 2 + [2] * 2
    assert again.model_dump(exclude={"created", "cost"}) == whole.model_dump(exclude={"created", "cost"})
    assert [each.name for each in tmp_path.iterdir()] == ["plan"]


def test_what_is_kept_of_another_run_or_damaged_is_not_used(tmp_path):
    model, probe, settings = ZOO["llama"](), tiny_probe(), peelwise.AllocateSettings(4.0, SMALL, points=0)
    whole = peelwise.allocate(model, probe, settings).record

    def stop(step):
        if step.stage == "codes-losses":
            raise StopHereError

    with pytest.raises(StopHereError):
        peelwise.allocate(model, probe, settings, out=tmp_path / "plan", progress=stop)
    kept = tmp_path / ".plan.unfinished"
    assert len(list(kept.iterdir())) == 6
    (kept / "block-0001.safetensors").write_bytes(b"\x00" * 50)
    (kept / "damage-0000.safetensors").write_bytes(b"")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    other = peelwise.allocate(model, probe, settings, out=tmp_path / "other").record
    with pytest.raises(StopHereError):
        peelwise.allocate(model, probe, settings, out=tmp_path / "plan", progress=stop)
    moved = peelwise.allocate(model, probe, settings, out=tmp_path / "plan").record
    assert moved.plan == other.plan
    assert moved.layers == other.layers != whole.layers
