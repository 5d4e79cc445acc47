"""A quantised model against its parent: the damage, what the bits explain of it, and what better codes win back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import peelwise
from audits import Snapshot, part_of, runner_of, tiny_probe
from gguf_files import llama_of_whole_blocks, write_llama_gguf
from peelwise.errors import FormatError, ModelError
from peelwise.formats.table import parse_format
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoints import open_model
from peelwise.model.weights.held import Held
from peelwise.nn import dense_, quantize_
from peelwise.references.quantized import solve
from peelwise.show.quantcheck.words import conclusion
from peelwise.tasks.quantcheck.layers import Candidate, Layer, input_sums
from peelwise.tasks.quantcheck.run import run_quantcheck
from peelwise.tasks.quantcheck.settings import QuantcheckSettings
from zoo import ZOO

QUICK = QuantcheckSettings(max_sweeps=2)


def _check(quantised: nn.Module, parent: nn.Module, settings: QuantcheckSettings = QUICK, **names: str):
    return run_quantcheck(
        Candidate(quantised, names.get("quantised", "small")),
        Candidate(parent, names.get("parent", "large")),
        tiny_probe(),
        settings,
    )


@pytest.mark.nightly
def test_a_trained_model_rounded_to_three_bits_leaves_something_on_the_table(small_gpt, training_probe) -> None:
    parent, _ = small_gpt("final")
    quantised = copy.deepcopy(parent)
    names = quantize_(quantised, "int3")
    before = Snapshot.of(quantised), Snapshot.of(parent)
    record = peelwise.quantcheck(quantised, parent, part_of(training_probe, fit=16, select=4, report=12)).record
    before[0].assert_unchanged(quantised)
    before[1].assert_unchanged(parent)
    loss = record.loss
    assert loss.kept
    assert loss.left.low > 0
    assert loss.parent < loss.best < loss.quantised
    assert loss.split.irreducible + loss.split.price_of_precision + loss.split.left_on_the_table == pytest.approx(
        loss.quantised, abs=1e-12
    )
    assert [layer.name for layer in record.layers] == names
    for layer in record.layers:
        parts = layer.split
        assert parts.irreducible + parts.price_of_precision + parts.left_on_the_table == pytest.approx(layer.error)
        assert parts.irreducible == 0
        assert layer.error == pytest.approx(layer.rounded, rel=1e-4)  # it was rounded to nearest
        assert 0 < parts.left_on_the_table < layer.error
    assert record.conclusion.case == "recoverable"
    assert "recoverable at the same bit width" in conclusion(record)
    assert json.loads(record.to_json())["kind"] == "quantcheck"


def test_a_model_of_the_best_codes_leaves_nothing_in_its_layers(small_gpt, training_probe) -> None:
    parent, _ = small_gpt("final")
    best = copy.deepcopy(parent)
    quantize_(best, "int4", skip=[m.name for block in find_blocks(best)[1:5] for m in block.linears])
    probe = part_of(training_probe, fit=8, select=4, report=12)
    runner = runner_of(copy.deepcopy(parent))
    traces = [runner.trace(part) for part in (probe.fit, probe.select, probe.report)]
    for block, twin in zip(runner.blocks, find_blocks(best), strict=True):
        if not twin.linears[0].low_bit:
            continue
        sums = [input_sums(runner, block, trace) for trace in traces]
        for linear, layer in zip(block.linears, twin.linears, strict=True):
            own = Layer(linear.name, block.index, linear.weight(), layer.held(), *(each[linear].zz for each in sums))
            layer.module.hold_(own.best(QuantcheckSettings())[0])
    record = peelwise.quantcheck(best, parent, probe).record
    assert len(record.layers) == 14
    assert max(layer.split.left_on_the_table / layer.error for layer in record.layers) < 0.05


@pytest.mark.nightly
def test_a_model_of_the_best_codes_in_running_order_leaves_nothing_in_the_loss(small_gpt, training_probe) -> None:
    """Rounding the same layers to nearest is the control: it leaves much."""
    parent, _ = small_gpt("final")
    skip = [m.name for block in find_blocks(parent)[1:5] for m in block.linears]
    probe = part_of(training_probe, fit=12, select=4, report=12)
    best = peelwise.quantise(parent, probe, peelwise.QuantiseSettings("int3", tuple(skip))).quantised()
    rounded = copy.deepcopy(parent)
    quantize_(rounded, "int3", skip=skip)
    found, control = (peelwise.quantcheck(each, parent, probe).record.loss for each in (best, rounded))
    assert found.left.mean < 0.2 * found.damage.mean
    assert control.left.mean > 0.4 * control.damage.mean
    assert control.left.low > 0


def test_dampings_are_chosen_by_select_and_help_where_tokens_are_few() -> None:
    """Inputs of uneven directions, 24 tokens for 32 of them: undamped sums believe what is chance."""
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(32, 32, generator=draw) @ torch.diag(torch.linspace(0.2, 2.0, 32))
    fit, select, report = (torch.randn(n, 32, generator=draw) @ mixing for n in (24, 24, 4096))
    sums = [x.T @ x / len(x) for x in (fit, select, report)]
    form, T = parse_format("int3"), torch.randn(16, 32, generator=draw)
    held = Held(form, form.encode(T))
    layer = Layer("map", 0, T, held, *sums)
    encoded, damping = layer.best(QUICK)
    undamped = solve(sums[0], T, form, starts=[held.encoded], max_sweeps=2).encoded
    assert damping > 0
    assert layer.error(layer.report, encoded) < 0.9 * layer.error(layer.report, undamped)
    assert layer.error(layer.select, encoded) <= layer.error(layer.select, held.encoded)
    many = Layer("map", 0, T, held, sums[2], sums[1], sums[2])
    plenty = solve(sums[2], T, form, starts=[held.encoded], max_sweeps=2).encoded
    assert many.error(sums[2], many.best(QUICK)[0]) < 1.1 * many.error(sums[2], plenty)  # control: nothing is lost


def test_sums_of_inputs_are_those_of_hooks() -> None:
    model = ZOO["qwen2"]()
    runner, probe = runner_of(model), tiny_probe()
    block = runner.blocks[1]
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        m.module.register_forward_hook(lambda _m, args, _y, n=m.name: seen.setdefault(n, []).append(args[0].detach()))
        for m in block.linears
    ]
    model(probe.fit.inputs)
    for handle in handles:
        handle.remove()
    for linear, sums in input_sums(runner, block, runner.trace(probe.fit)).items():
        S = sums.zz
        x = torch.cat([rows.flatten(0, -2) for rows in seen[linear.name]]).double()
        torch.testing.assert_close(S.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_plain_weights_that_were_quantised_need_the_name_of_their_format() -> None:
    parent = ZOO["llama"]()
    quantised = copy.deepcopy(parent)
    quantize_(quantised, "int3:group=16")
    dense_(quantised)
    with pytest.raises(FormatError, match=r"small says of no layer which format it holds.*--format"):
        _check(quantised, parent)
    record = _check(quantised, parent, QuantcheckSettings(format=parse_format("int3:group=16"), max_sweeps=2))
    assert {layer.format for layer in record.layers} == {"int3:group=16,symmetric"}
    with pytest.raises(FormatError, match=r"q_proj: The weights do not obey int2:channel"):
        _check(quantised, parent, QuantcheckSettings(format=parse_format("int2"), max_sweeps=2))
    with pytest.raises(FormatError, match=r"q_proj: group=32 does not divide the 48 inputs"):
        _check(quantised, parent, QuantcheckSettings(format=parse_format("int3:group=32"), max_sweeps=2))


def test_without_budget_layers_are_said_not_to_be_measured() -> None:
    parent = ZOO["llama"]()
    quantised = copy.deepcopy(parent)
    quantize_(quantised, "ternary")
    record = _check(quantised, parent, QuantcheckSettings(budget=1e-6))
    assert not record.complete
    assert all(layer.split is None and layer.error > 0 for layer in record.layers)
    assert record.loss.split.left_on_the_table == 0
    assert any(note.code == "budget-ended" for note in record.notes)
    assert {stage.name: stage.forward_equivalents for stage in record.cost.stages}["codes"] == 0  # not even begun


def _narrower(model: nn.Module) -> nn.Module:
    layer = model.model.layers[0].mlp
    layer.up_proj = nn.Linear(layer.up_proj.in_features, layer.up_proj.out_features + 1)
    return model


def _fewer_blocks(model: nn.Module) -> nn.Module:
    del model.model.layers[-1]
    return model


def _other_vocabulary(model: nn.Module) -> nn.Module:
    model.resize_token_embeddings(model.config.vocab_size + 8)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_narrower, r"up_proj is \(\d+, 48\) in large and .* not its parent"),
        (_fewer_blocks, "large has 2 blocks, small 3"),
        (_other_vocabulary, r"large knows \d+ tokens, small \d+: it is not its parent"),
    ],
)
def test_another_models_parent_is_refused(change, message: str) -> None:
    quantised = ZOO["llama"]()
    quantize_(quantised, "ternary")
    with pytest.raises(ModelError, match=message):
        _check(quantised, change(ZOO["llama"]()))


def test_a_gguf_file_is_compared_with_its_parent_by_the_codes_it_stores(tmp_path) -> None:
    """Rows of its query and key maps are stored in another order: taken for the parent's they would be far off."""
    parent, file = llama_of_whole_blocks(), tmp_path / "model.gguf"
    write_llama_gguf(parent, file, "Q4_0")
    record = peelwise.quantcheck(file, parent, tiny_probe(in_distribution=True)).record
    assert len(record.layers) == 14
    opened = open_model(file, with_tokenizer=False).model
    found, wanted = ({m.name: m for b in find_blocks(each) for m in b.linears} for each in (opened, parent))
    for layer in record.layers:
        assert layer.format == "int4:group=32,symmetric"
        assert layer.bits_per_weight == 4.5
        damage = found[layer.name].weight() - wanted[layer.name].weight()
        assert damage.square().sum() < 0.02 * wanted[layer.name].weight().square().sum()
        assert 0 < layer.error < 0.02
        parts = layer.split
        assert parts.price_of_precision + parts.left_on_the_table == pytest.approx(layer.error)
        assert parts.left_on_the_table > 0
