"""Fine-tuning as it is done: adapters of PEFT are what is asked about, exactly, and their frozen base is no alarm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peelwise
from audits import ONE_ROUND, tiny_probe
from peelwise.errors import UnsupportedModelError
from peelwise.model.architectures import find_blocks, find_head
from peelwise.model.runner import Runner
from zoo import ZOO, sample_ids

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow

LAYERS = ["q_proj", "v_proj", "down_proj"]
LLM: dict[str, Any] = {"task_type": "CAUSAL_LM"}


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": LAYERS} | LLM | options)


# Kinds whose adapters are linear layers: these are asked about, and nothing else.
LINEAR: dict[str, Callable[[], Any]] = {
    "LoRA": lora,
    "rsLoRA": lambda: lora(use_rslora=True),
    "DoRA": lambda: lora(use_dora=True),
    "PiSSA": lambda: lora(init_lora_weights="pissa"),
    "LoRA and a head": lambda: lora(modules_to_save=["lm_head"]),
    "LoRA in one block": lambda: lora(layers_to_transform=[1]),
}
# Kinds whose adapters are vectors or what other numbers are made of: all layers that run are asked about.
OTHER: dict[str, Callable[[], Any]] = {
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, target_modules=LAYERS, **LLM),
    "IA3": lambda: peft.IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"], **LLM),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=LAYERS, **LLM),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=LAYERS, **LLM),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], **LLM),
}


def adapted(kind: str, *, trained: bool = True) -> nn.Module:
    """Return a tiny Llama with adapters, as if trained for a while, or as they begin."""
    torch.manual_seed(0)
    model = peft.get_peft_model(ZOO["llama"](), (LINEAR | OTHER)[kind]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and trained:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def loss_of(model: nn.Module, probe: peelwise.Probe) -> float:
    """Return the model's own loss on the report part, by its plain forward."""
    runner = Runner(model, find_blocks(model))
    return runner.trace(probe.report).mean


@pytest.mark.parametrize("kind", LINEAR)
def test_adapters_are_refined_exactly_and_the_certificate_holds(kind: str, tmp_path: Path) -> None:
    model, probe = adapted(kind), tiny_probe(in_distribution=True)
    report = peelwise.audit(model, probe, ONE_ROUND)
    assert report.witness
    assert all(".lora_" in name for name in report.witness)
    report.save(tmp_path / "c")
    found = peelwise.verify(tmp_path / "c", model)
    assert found.holds, found.reason
    written = copy.deepcopy(model)
    parameters = dict(written.named_parameters())
    with torch.no_grad():
        for name, change in report.witness.items():
            if name.startswith("composed/"):
                parameters[f"{name.removeprefix('composed/')}.weight"].add_(change)
    assert report.record.loss.composed is not None
    assert loss_of(written, probe) == pytest.approx(report.record.loss.composed, abs=2e-4)
    assert report.record.loss.composed != pytest.approx(loss_of(model, probe), abs=2e-3)  # else nothing was tried


@pytest.mark.parametrize("kind", OTHER)
def test_adapters_that_are_no_linear_layers_are_no_obstacle(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    report = peelwise.audit(model, tiny_probe(in_distribution=True), ONE_ROUND)
    report.save(tmp_path / "c")
    assert peelwise.verify(tmp_path / "c", model).holds


@pytest.mark.parametrize("kind", [*LINEAR, "IA3"])
def test_a_frozen_base_and_zeros_to_begin_with_are_no_alarm(kind: str) -> None:
    assert told(adapted(kind, trained=False)) & {"frozen", "still-zero", "dead-units", "no-gradient"} == set()


def told(model: nn.Module, *, steps: int = 5) -> set[str]:
    """Return the kinds of what a monitor says of a short training."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    events: list[peelwise.Event] = []
    options: dict[str, Any] = {"budget": None, "schedule": peelwise.every(1), "store": None}
    with peelwise.Monitor(model, tiny_probe(), optimizer=optimizer, on_event=events.append, **options) as monitor:
        ids = sample_ids(4, 16)
        for step in range(1, steps + 1):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            monitor.step(step, float(loss.detach()))
            optimizer.zero_grad()
    return {event.kind for event in events}


def test_an_adapter_frozen_in_one_block_alone_is_told() -> None:
    model = adapted("LoRA", trained=False)
    for name, parameter in model.named_parameters():
        if "layers.1.self_attn.q_proj.lora_A" in name:
            parameter.requires_grad_(False)
    assert "frozen" in told(model)


def test_an_adapter_whose_two_matrices_are_zero_is_told_once_training_began() -> None:
    model = adapted("LoRA", trained=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.1." in name and "lora_A" in name:
                parameter.zero_()
    assert "still-zero" not in told(copy.deepcopy(model), steps=2)
    assert "still-zero" in told(model, steps=12)


def test_a_check_leaves_the_base_below_dora_as_it_is_and_names_it() -> None:
    model = adapted("DoRA")
    record = peelwise.check(model, tiny_probe()).record
    (said,) = [note for note in record.notes if note.code == "left-out"]
    assert "self_attn.q_proj.base_layer.weight (blocks 0-2)" in str(said.values["names"])


def test_the_head_that_is_trained_beside_adapters_is_found() -> None:
    model = adapted("LoRA and a head")
    head = find_head(model, find_blocks(model))
    assert isinstance(head, nn.Linear)
    assert head.weight.requires_grad


@pytest.mark.parametrize(
    "config", [peft.PrefixTuningConfig, peft.PromptTuningConfig], ids=["prefix tuning", "prompt tuning"]
)
def test_virtual_tokens_are_refused_in_a_sentence(config: Any) -> None:
    model = peft.get_peft_model(ZOO["llama"](), config(num_virtual_tokens=4, **LLM))
    with pytest.raises(UnsupportedModelError, match=r"4 virtual tokens .*get_base_model"):
        find_blocks(model)
