"""Experts that are parts of one parameter take part in a plan, and decide together."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import peelwise
from audits import Snapshot, tiny_probe
from peelwise.engine.curvature import output_curvatures
from peelwise.engine.in_order import Walk
from peelwise.errors import FormatError
from peelwise.formats.table import parse_format
from peelwise.model.architectures import find_blocks
from peelwise.model.experts import experts_called
from peelwise.model.guard import untouched
from peelwise.model.runner import Runner
from peelwise.records.allocation import AllocationRecord
from peelwise.show.allocate.exports import exports
from peelwise.show.allocate.report import render_html
from peelwise.show.html.prices import within
from peelwise.tasks.allocate import run
from peelwise.tasks.allocate.groups import Group, groups_of
from zoo import BLOCKS, ZOO

FORMATS = ("int2:group=16", "int3:group=16", "int4:group=16")
MIXTURES = ["mixtral", "gpt-oss"]


@pytest.fixture(scope="module", params=MIXTURES)
def planned(request) -> tuple[nn.Module, AllocationRecord]:
    model = ZOO[request.param]()
    before = Snapshot.of(model)
    record = peelwise.allocate(model, tiny_probe(), peelwise.AllocateSettings(3.4, FORMATS, points=0)).record
    before.assert_unchanged(model)
    return model, record


def test_all_experts_of_a_parameter_have_one_format(planned) -> None:
    model, record = planned
    linears = {m.name: m for block in find_blocks(model) for m in block.linears}
    assert set(record.plan) == set(linears)
    assert {layer.name for layer in record.layers if layer.parameter} == {n for n, m in linears.items() if m.is_expert}
    groups: dict[int, set[tuple[str, str]]] = {}
    for layer in record.layers:
        assert layer.name.startswith(layer.parameter or layer.name)
        groups.setdefault(layer.group, set()).add((layer.parameter or layer.name, layer.format))
    # Queries, keys and values; the output; gate and up; down: four groups a block.
    assert len(groups) == 4 * BLOCKS
    for group in groups.values():
        assert len({form for _, form in group}) == 1
        assert any("experts" in name for name, _ in group) == (len(group) == 1 and "experts" in next(iter(group))[0])
    bits = sum(layer.bits_per_weight * layer.weights for layer in record.layers)
    assert bits / sum(linear.weight().numel() for linear in linears.values()) == pytest.approx(record.bits_per_weight)


def test_the_plan_is_what_quantise_takes(planned) -> None:
    model, record = planned
    made = peelwise.quantise(model, tiny_probe(), peelwise.QuantiseSettings(plan=record.plan, max_sweeps=0)).record
    assert {layer.name: layer.format for layer in made.layers} == record.plan
    given = {layer.name: layer.fit_tokens for layer in record.layers}
    assert {layer.name: layer.fit_tokens for layer in made.layers}.keys() == given.keys()
    first = [layer.name for layer in record.layers if layer.block == 0 and "self_attn" in layer.name]
    assert all(given[name] == made.probe.fit_tokens for name in first)


def test_views_have_one_row_for_all_experts_of_a_parameter(planned) -> None:
    record = planned[1]
    stored = [layer for layer in record.stored if layer.parameter]
    assert len(stored) == 2 * BLOCKS
    assert sum(layer.weights for layer in record.stored) == sum(layer.weights for layer in record.layers)
    assert sum(layer.share for layer in record.stored) == pytest.approx(1)
    page = render_html(record)
    names = {within(layer.name, layer.block) for layer in stored}
    assert len(names) == 2
    assert all(page.count(f">{name}</th>") == BLOCKS for name in names)
    assert not any(f"{name}.0" in page for name in names)


def test_exports_name_experts_as_the_tools_do(planned) -> None:
    record = planned[1]
    first = next(layer.parameter for layer in record.layers if layer.parameter)
    layers = tuple(
        layer.model_copy(update={"format": "dense:float32"}) if layer.parameter == first else layer
        for layer in record.layers
    )
    texts = exports(record.model_copy(update={"layers": layers}))
    owner = first.rpartition(".")[0]
    assert f'"{owner}"' in texts["transformers.json"]
    assert f'"{owner}",' in texts["onnx_nodes.py"]
    assert "--tensor-type blk.0.ffn_gate_exps.weight=f16" in texts["llama-cpp.txt"]
    ignored = texts["llm-compressor.yaml"].partition("ignore: [")[2].partition("]")[0]
    assert r"mlp\\.experts\\.\\d+\\.(gate_proj|up_proj)$" in ignored
    space: dict = {}
    exec(texts["torchao_config.py"], space)
    assert set(space["config"].fqn_to_config) == {layer.name for layer in record.layers if not layer.parameter}


def _groups(model: nn.Module, part) -> list[Group]:
    with untouched(model):
        runner = Runner(model, find_blocks(model))
        trace = runner.trace(part)
        wanted = {m for block in runner.blocks for m in block.linears}
        curvatures = output_curvatures(runner, trace, wanted) or {}
        walk, found = Walk(runner, runner, {m: m for m in wanted}, [trace, trace], [trace, trace]), []
        for block in runner.blocks:
            found += groups_of(walk, block, [parse_format("int3:group=16")], curvatures)
            walk.leave(block)
    return found


@pytest.mark.parametrize("kind", MIXTURES)
def test_what_an_expert_costs_is_counted_per_token_of_the_text(kind: str) -> None:
    """Beside sums over the rows of every expert, one by one in float64: those that see few tokens cost little."""
    model, part = ZOO[kind](), tiny_probe().fit
    inputs: dict[str, list[torch.Tensor]] = {}
    outputs: dict[str, list[torch.Tensor]] = {}
    linears = [m for block in find_blocks(model) for m in block.linears if m.is_expert]

    def keep(name: str) -> Callable[..., None]:
        def after(_module: nn.Module, x: tuple[torch.Tensor], y: torch.Tensor) -> None:
            y.retain_grad()
            inputs.setdefault(name, []).append(x[0].detach())
            outputs.setdefault(name, []).append(y)

        return after

    with experts_called(model):
        handles = [m.module.register_forward_hook(keep(m.name)) for m in linears]
        logits = model(part.inputs, use_cache=False).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), part.targets.flatten(), reduction="sum").backward()
        for handle in handles:
            handle.remove()
    model.zero_grad()
    members = [member for group in _groups(model, part) for member in group.members if member.linear.is_expert]
    assert {member.linear.name for member in members} == {m.name for m in linears}
    form = parse_format("int3:group=16")
    for member in members:
        name = member.linear.name
        x, g = torch.cat(inputs[name]).double(), torch.cat([y.grad for y in outputs[name]]).double()
        assert member.tokens == len(x)
        D = form.decode(member.codes[0]).double() - member.linear.weight().double()
        S, F = x.T @ x / len(x), g.T @ g / len(x)
        slow = 0.5 * float(torch.trace(F @ D @ S @ D.T)) * len(x) / part.tokens
        assert member.predicted[0] == pytest.approx(slow, rel=0.02), name


def _one_sided() -> nn.Module:
    """Return a mixture whose routers send every token to the same two experts."""
    model = ZOO["mixtral"]()
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data.zero_()
    return model


def test_experts_that_get_no_token_have_the_format_of_the_others_and_are_told() -> None:
    model = _one_sided()
    record = peelwise.allocate(model, tiny_probe(), peelwise.AllocateSettings(3.4, FORMATS, points=0)).record
    unseen = [layer for layer in record.layers if layer.fit_tokens == 0]
    assert len(unseen) == BLOCKS * 2 * 2
    assert all(set(layer.predicted.values()) == {0.0} for layer in unseen)
    formats: dict[str, set[str]] = {}
    for layer in record.layers:
        formats.setdefault(layer.parameter or layer.name, set()).add(layer.format)
    assert all(len(each) == 1 for each in formats.values())
    (said,) = (note for note in record.notes if note.code == "few-expert-tokens")
    assert said.values == {
        "block": "model.layers.0.mlp.experts",
        "matrices": 4,
        "of": 8,
        "without": 4,
        "more": BLOCKS - 1,
    }


def test_without_curvature_predictions_are_brought_to_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = ZOO["llama"](), peelwise.AllocateSettings(4.0, ("int2:group=16", "int4:group=16"), points=0)
    monkeypatch.setattr(run, "_LEAST_FACTOR", 0.0)
    monkeypatch.setattr(run, "_MOST_FACTOR", math.inf)
    known = peelwise.allocate(model, tiny_probe(), settings).record
    monkeypatch.setattr(run, "output_curvatures", lambda *_args, **_more: None)
    monkeypatch.setattr(run, "fits", lambda _linears: False)
    record = peelwise.allocate(model, tiny_probe(), settings).record
    assert [note.code for note in record.notes if note.code == "no-curvature"] == ["no-curvature"]
    for form in record.formats:  # each block's predictions now add up to what it was measured to cost
        for block in range(BLOCKS):
            sums = [
                sum(layer.predicted[form] for layer in each.layers if layer.block == block) for each in (known, record)
            ]
            assert sums[0] == pytest.approx(sums[1], abs=1e-6)


def test_groups_that_divide_are_named_with_their_option() -> None:
    model = ZOO["llama"]()
    with pytest.raises(FormatError, match=r"Groups of 16, 8 or 4 divide the inputs of all layers: --formats int2:gr"):
        peelwise.allocate(model, tiny_probe(), peelwise.AllocateSettings(formats=("int2:group=64", "int4:group=64")))
    with pytest.raises(FormatError, match=r"--format int4:group=16\. Or leave it out with --skip model\.layers"):
        peelwise.quantise(model, tiny_probe(), peelwise.QuantiseSettings("int4:group=64"))
