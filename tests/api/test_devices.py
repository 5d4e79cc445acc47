"""The whole product where the model is on a GPU: nothing is left behind, and every number is that of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import peelwise
import peelwise.act
from audits import tiny_probe
from example_models import bert_classifier, classified, images, vit
from peelwise.nn import quantize_
from peelwise.records.files import read_any_record
from peelwise.store.reader import RunReader
from second_device import second_device
from zoo import ZOO, sample_ids

Move = Callable[[nn.Module], nn.Module]
Way = Callable[[Move, Path], Any]

QUICK = peelwise.AuditSettings(600.0, joint_rounds=1, solo_rounds=1)
FORMAT = "int3:group=8"


def llama(blocks: int = 2, seed: int = 0, **options: Any) -> nn.Module:
    """Return a small Llama."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=8, intermediate_size=16, num_hidden_layers=blocks, num_attention_heads=2,
        initializer_range=0.2, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def probe(**options: Any) -> peelwise.Probe:
    return tiny_probe(24, 12, in_distribution=True, **options)


def audit(move: Move, out: Path) -> Any:
    report = peelwise.audit(move(llama()), probe(), QUICK)
    report.save(out)
    return report.record, report.witness, written(out)


def verified(move: Move, out: Path) -> Any:
    peelwise.audit(llama(), probe(), QUICK).save(out)
    model = move(llama())
    return [peelwise.verify(out, model), peelwise.verify(out, model, full=True, replay=True)]


def check(move: Move, out: Path) -> Any:
    model = llama(6)
    with torch.no_grad():
        model.get_submodule("model.layers.3.mlp.down_proj").weight.mul_(50)
    report = peelwise.check(move(model), probe(), out=out)
    return report.record, written(out), peelwise.verify(out, move(model), full=True)


def changed(model: nn.Module, prefix: str = "") -> nn.Module:
    with torch.no_grad():
        model.get_submodule(f"{prefix}model.layers.1.mlp.down_proj").weight.mul_(-3.0)
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def compare(move: Move, out: Path) -> Any:
    old, new = move(llama()), move(changed(llama()))
    report = peelwise.compare(old, new, probe(), peelwise.CompareSettings(layers_of=9), out=out)
    return report.record, written(out), peelwise.verify(out, new, old=old, full=True)


def rounded(model: nn.Module) -> nn.Module:
    quantize_(model, FORMAT)
    return model


def quantcheck(move: Move, out: Path) -> Any:
    settings = peelwise.QuantcheckSettings(max_sweeps=1, allocate=6.0, activations="int8:channel")
    report = peelwise.quantcheck(
        move(rounded(llama())), move(llama()), probe(), settings, base=move(changed(llama())), out=out
    )
    return report.record, written(out)


def quantise(move: Move, out: Path) -> Any:
    report = peelwise.quantise(move(llama()), probe(), peelwise.QuantiseSettings(FORMAT, max_sweeps=1), out=out)
    return report.record, written(out), report.quantised().state_dict()


def allocate(move: Move, out: Path) -> Any:
    settings = peelwise.AllocateSettings(5.0, ("int2:group=8", "int4:group=8"), points=1)
    report = peelwise.allocate(move(llama()), probe(), settings, out=out)
    return report.record, written(out)


def peel(move: Move, out: Path) -> Any:
    report = peelwise.peel(move(llama()), probe(), peelwise.PeelSettings(600.0, rounds=1))
    report.save(out)
    return report.record, report.witness, written(out), peelwise.verify(out, move(llama()), replay=True)


def anatomy(move: Move, out: Path) -> Any:
    report = peelwise.anatomy(move(llama(3)), probe(), peelwise.AnatomySettings("10m"), out=out)
    return report.record, written(out)


def yes(move: Move, out: Path) -> Any:
    torch.manual_seed(0)
    square = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    other = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(120, 8)
    y = x @ torch.randn(8, 4)
    published, streamed = peelwise.YesMonitor(move(square), x, y, mode="published"), peelwise.yes_bounds(square, x, y)
    labels = peelwise.yes_bounds(move(other), x, x[:, :3].argmax(1), loss="cross_entropy")
    return [vars(each) for each in (published.step(0), streamed, labels)]


def low_bit(move: Move, out: Path) -> Any:
    report = peelwise.audit(move(rounded(llama())), probe(), QUICK)
    report.save(out)
    return report.record, report.witness, written(out), peelwise.verify(out, move(rounded(llama())), full=True)


def experts(move: Move, out: Path) -> Any:
    model = move(ZOO["mixtral"]())
    report = peelwise.audit(model, probe(), replace(QUICK, controls=False))
    report.save(out)
    return report.record, report.witness, peelwise.check(model, probe()).record, peelwise.verify(out, model, full=True)


def adapters(move: Move, out: Path) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = move(changed(peft.get_peft_model(llama(), options).eval(), "base_model.model."))
    report = peelwise.audit(model, probe(), replace(QUICK, controls=False))
    report.save(out)
    return report.record, report.witness, peelwise.verify(out, model, full=True)


def batches(move: Move, out: Path) -> Any:
    words, pictures = classified(), images()
    audited = peelwise.audit(
        move(bert_classifier()), peelwise.Probe.from_batches([words]), replace(QUICK, controls=False)
    )
    audited.save(out / "audit")
    given = peelwise.Probe.from_batches(
        [pictures], loss=lambda output, batch: cross_entropy(output.logits, batch["labels"], reduction="none")
    )
    model = move(vit())
    return audited.record, audited.witness, peelwise.check(model, given).record


def given_on_it(move: Move, out: Path) -> Any:
    """A probe whose tokens are on the device, as a loader of batches may leave them."""
    ids = sample_ids(24, 13)
    device = next(move(llama()).parameters()).device
    text = peelwise.Probe.from_tokens(ids.to(device))
    examples = peelwise.Probe.from_batches([{key: value.to(device) for key, value in classified().items()}])
    return peelwise.check(move(llama()), text).record, peelwise.check(move(bert_classifier()), examples).record


def trained(move: Move, out: Path) -> Any:
    """Training beside a monitor of everything, by a schedule of blocks and a map of rates, with a witness put in."""
    out.mkdir()
    model = move(llama(3)).train()
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(peelwise.act.param_groups(model, [1.0, 2.0, 3.0], base_lr=1e-3))
    schedule = peelwise.act.BlockSchedule(model, optimizer, peelwise.act.random_blocks(2))
    rates = peelwise.act.RateMap(
        optimizer, lambda: [float(layer.mlp.down_proj.weight.detach().norm()) for layer in model.model.layers], every=2
    )
    monitor = peelwise.Monitor(
        model, probe(), optimizer=optimizer, budget=None, schedule=peelwise.every(2), store=out / "run.db",
        signals=("all",),
    )  # fmt: skip
    measured = []
    for step in range(7):
        ids = sample_ids(2, 13, seed=step).to(device)
        loss = cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        rates.step()
        measured.append(monitor.step(step, loss=loss))
        optimizer.zero_grad()
    monitor.close()
    applied = peelwise.act.apply_witness_(model, {LAYER: torch.full((8, 16), 0.01)}, optimizer)
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    applied.revert()
    with RunReader(out / "run.db") as reader:
        rows = [dict(row) for row in reader.steps(1)]
    return measured, after, model.state_dict(), monitor.events, rows


LAYER = "model.layers.1.mlp.down_proj"


WAYS: dict[str, Way] = {
    "audit": audit,
    "verify": verified,
    "check": check,
    "compare": compare,
    "quantcheck": quantcheck,
    "quantise": quantise,
    "allocate": allocate,
    "peel": peel,
    "anatomy": anatomy,
    "yes": yes,
    "low-bit": low_bit,
    "experts": experts,
    "adapters": adapters,
    "batches": batches,
    "given": given_on_it,
    "training": trained,
}


def written(folder: Path) -> dict[str, Any]:
    """Return every tensor in the files of a folder."""
    from safetensors.torch import load_file

    assert read_any_record(folder) is not None if (folder / "audit.json").exists() else True
    return {file.name: load_file(file) for file in sorted(folder.rglob("*.safetensors"))}


# What says when, where, how long.
TIMES = ("created", "cost", "digest", "seconds", "source", "sha256", "share", "when", "bytes")


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Return every number, text and tensor, tensors on the CPU, without what says when, where and how long."""
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    elif hasattr(value, "__dataclass_fields__"):
        value = vars(value)
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for key, item in value.items():
            if not any(word in str(key) for word in TIMES):
                found |= leaves(item, f"{path}.{key}")
        return found
    if isinstance(value, list | tuple):
        return {k: v for i, item in enumerate(value) for k, v in leaves(item, f"{path}[{i}]").items()}
    return {path: value.detach().cpu() if isinstance(value, Tensor) else value}


def unlike(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Return what differs."""
    return {
        key: (found.get(key), expected.get(key))
        for key in found | expected
        if not same(found.get(key), expected.get(key))
    }


def same(a: Any, b: Any) -> bool:
    """Whether two leaves agree; last digits of LAPACK depend on where memory lies."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-9, equal_nan=True)
    if isinstance(a, float) and isinstance(b, float):
        return a == pytest.approx(b, rel=1e-6, abs=1e-9, nan_ok=True)
    return bool(a == b)


# These take about as long as all tests of a product: by night.
LONG = ("verify", "check", "quantcheck", "quantise", "allocate", "peel", "anatomy", "low-bit", "experts", "batches")


@pytest.mark.parametrize("way", [pytest.param(w, marks=pytest.mark.nightly) if w in LONG else w for w in WAYS])
def test_on_a_second_device_everything_is_as_on_the_cpu(way: str, tmp_path: Path) -> None:
    expected = leaves(WAYS[way](lambda model: model, tmp_path / "cpu"))
    with second_device() as device:
        found = leaves(WAYS[way](lambda model: model.to(device), tmp_path / "device"))
    assert not unlike(found, expected)
