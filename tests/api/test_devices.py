"""The whole product where the model is on a GPU: nothing is left behind, and every number is that of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from example_models import KINDS, bert_classifier, classified, images, vit
from peelwise.errors import DeviceError, PeelwiseError, UnsupportedModelError
from peelwise.model.checkpoints import open_model
from peelwise.model.fresh import fresh_copy
from peelwise.model.runner import Runner
from peelwise.nn import quantize_
from peelwise.records.files import read_any_record
from peelwise.store.reader import RunReader
from peelwise.tasks.yes.bounds import _at_initialisation
from second_device import PEAK, is_on_it, second_device
from stages import stage_folder
from tiny_llama import tiny_llama, tiny_tokenizer
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


def plain(move: Move, out: Path) -> Any:
    """A model of one's own, whose untrained twin is drawn anew."""
    report = peelwise.audit(move(ZOO["plain"]()), probe(), QUICK)
    return report.record, report.witness


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
    for step in range(5):
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
    "plain": plain,
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
LONG = (
    "training",
    "yes",
    "given",
    "plain",
    "verify",
    "check",
    "quantcheck",
    "quantise",
    "allocate",
    "peel",
    "anatomy",
    "low-bit",
    "experts",
    "batches",
)


@pytest.mark.parametrize("way", [pytest.param(w, marks=pytest.mark.nightly) if w in LONG else w for w in WAYS])
def test_on_a_second_device_everything_is_as_on_the_cpu(way: str, tmp_path: Path) -> None:
    expected = leaves(WAYS[way](lambda model: model, tmp_path / "cpu"))
    with second_device() as device:
        found = leaves(WAYS[way](lambda model: model.to(device), tmp_path / "device"))
    assert not unlike(found, expected)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*ZOO, *KINDS])
def test_models_of_every_kind_are_checked_as_on_the_cpu(name: str) -> None:
    def checked(move: Move) -> dict[str, Any]:
        if name in ZOO:
            return leaves(peelwise.check(move(ZOO[name]()), probe()).record)
        make, batch = KINDS[name]
        return leaves(peelwise.check(move(make()), peelwise.Probe.from_batches([batch()])).record)

    expected = checked(lambda model: model)
    with second_device() as device:
        assert not unlike(checked(lambda model: model.to(device)), expected)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["mixtral", "lfm2", "low-bit", "checkpointing"])
def test_trainings_of_every_kind_are_followed_as_on_the_cpu(name: str) -> None:
    def followed(move: Move) -> dict[str, Any]:
        model = move(ZOO[name]() if name in ZOO else llama(3)).train()
        if name == "low-bit":
            quantize_(model, "ternary:channel")
        if name == "checkpointing":
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        device = next(model.parameters()).device
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        monitor = peelwise.Monitor(
            model, probe(), optimizer=optimizer, budget=None, schedule=peelwise.every(2), store=None, signals=("all",)
        )
        measured = []
        for step in range(7):
            ids = sample_ids(2, 13, seed=step).to(device)
            loss = cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            measured.append(monitor.step(step, loss=loss))
            optimizer.zero_grad()
        monitor.close()
        assert not [event for event in monitor.events if event.kind.startswith("not-")]
        return leaves([measured, model.state_dict()])

    expected = followed(lambda model: model)
    with second_device() as device:
        assert not unlike(followed(lambda model: model.to(device)), expected)


# -- controls: what is left behind is found -------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["inputs", "targets", "weights"])
def test_a_tensor_that_the_product_left_behind_is_found(monkeypatch: pytest.MonkeyPatch, left: str) -> None:
    whole = Runner._batches

    def batches_of(runner: Runner, split: Any) -> Iterator[Any]:
        for batch in whole(runner, split):
            yield replace(batch, **{left: getattr(batch, left).cpu()})

    monkeypatch.setattr(Runner, "_batches", batches_of)
    peelwise.check(llama(), probe(), peelwise.CheckSettings(most_witnesses=0))
    with second_device() as device, pytest.raises((RuntimeError, PeelwiseError), match="to be on the same device"):
        peelwise.check(llama().to(device), probe(), peelwise.CheckSettings(most_witnesses=0))


def test_numbers_are_not_alike_where_a_weight_is_another(tmp_path: Path) -> None:
    first = leaves(peelwise.check(llama(), probe(), peelwise.CheckSettings(most_witnesses=0)).record)
    model = llama()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] += 1e-3
    assert unlike(leaves(peelwise.check(model, probe(), peelwise.CheckSettings(most_witnesses=0)).record), first)


# -- what a GPU has of its own ----------------------------------------------------------------------------------


def test_models_drawn_anew_are_the_same_on_every_device() -> None:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    expected = [_at_initialisation(net, 3).state_dict(), fresh_copy(ZOO["plain"](), 3).state_dict()]
    with second_device() as device:
        states = torch.get_rng_state(), torch.cuda.get_rng_state()
        found = [_at_initialisation(net.to(device), 3)]
        assert all(map(torch.equal, states, (torch.get_rng_state(), torch.cuda.get_rng_state())))
        found.append(fresh_copy(ZOO["plain"]().to(device), 3))
        assert all(is_on_it(p) for model in found for p in model.parameters())
        assert not unlike(leaves([model.state_dict() for model in found]), leaves(expected))


def test_random_numbers_of_the_gpu_go_on_as_they_were() -> None:
    with second_device() as device:
        model, text = ZOO["plain"]().to(device), probe()
        torch.randn(3, device=device)
        before = torch.get_rng_state(), torch.cuda.get_rng_state()
        peelwise.audit(model, text, peelwise.AuditSettings(600.0, joint_rounds=1, solo_rounds=0))
        assert all(map(torch.equal, before, (torch.get_rng_state(), torch.cuda.get_rng_state())))


def test_the_memory_that_a_certificate_names_is_the_gpu_s(tmp_path: Path) -> None:
    settings = peelwise.CheckSettings(most_witnesses=0)
    with second_device() as device:
        assert peelwise.check(llama().to(device), probe(), settings).record.cost.peak_bytes == PEAK
        assert peelwise.check(llama(), probe(), settings).record.cost.peak_bytes != PEAK


def test_the_monitor_waits_for_the_gpu_before_its_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with second_device() as device:
        waited: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
        model = llama().to(device)
        monitor = peelwise.Monitor(model, probe(), budget=None, schedule=peelwise.every(2), store=None)
        waited.clear()
        found = [monitor.step(step, loss=torch.tensor(2.0, device=device)) for step in range(3)]
        monitor.close()
    assert waited == [device] * sum(each is not None for each in found)
    assert waited


def test_the_command_line_opens_a_model_on_the_gpu(run: Callable[..., Any], tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "certificate"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with second_device():
        code, shown, error = run(
            "audit", folder, "--tokens", 1500, "--joint-rounds", 1, "--solo-rounds", 1, "--out", out
        )
        assert (code, error.count("error")) == (0, 0), (shown, error)
        assert read_any_record(out).cost.peak_bytes == PEAK
        code, shown, error = run("verify", out, "--device", "cuda")
        assert code == 0, (shown, error)
    assert run("verify", out)[0] == 0
    with pytest.raises(DeviceError, match="'cuda' is not available here"):
        open_model(folder, device="cuda")


def test_a_trainer_that_trains_on_the_gpu(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    def losses(folder: Path) -> list[float]:
        rows = [{"input_ids": row, "labels": row} for row in sample_ids(16, 13)]
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, save_strategy="no", report_to="none",
            disable_tqdm=True, dataloader_pin_memory=False, optim="adamw_torch",
        )  # fmt: skip
        trainer = Trainer(llama().train(), arguments, train_dataset=rows)
        callback = peelwise.attach(trainer, probe(), budget=None, schedule=peelwise.every(2), store=folder / "run.db")
        trainer.train()
        assert not [event for event in callback.monitor.events if event.kind == "not-measured"]
        with RunReader(folder / "run.db") as reader:
            return [row["loss"] for row in reader.steps(1)] + [row["probe_loss"] for row in reader.probes(1)]

    expected = losses(tmp_path / "cpu")
    with second_device():
        assert losses(tmp_path / "gpu") == pytest.approx(expected, rel=1e-6)


def test_apples_gpu_is_refused_in_a_sentence(run: Callable[..., Any]) -> None:
    with second_device("mps") as device:
        model, words = llama().to(device), "is on mps, which has no float64, .* Move it to the CPU"
        for ask in (peelwise.check, peelwise.audit, peelwise.peel, peelwise.anatomy):
            with pytest.raises(UnsupportedModelError, match=words):
                ask(model, probe())
        with pytest.raises(UnsupportedModelError, match=words):
            peelwise.quantise(model, probe(), peelwise.QuantiseSettings(FORMAT))
        with pytest.raises(UnsupportedModelError, match=words):
            peelwise.compare(model, llama(seed=1).to(device), probe())
        with pytest.raises(UnsupportedModelError, match=words):
            peelwise.Monitor(model, probe(), store=None)
        with pytest.raises(UnsupportedModelError, match=words):
            peelwise.yes_bounds(
                nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(device), torch.randn(9, 4), torch.randn(9, 4)
            )
        code, _, error = run("check", "smollm2", "--device", "mps")
    assert (code, error.strip().splitlines()[-1]) == (
        2, "error: Not yet: device mps, which has no float64, in which losses and sums are added up. Use cpu."
    )  # fmt: skip


def test_a_gpu_whose_memory_is_full_is_told_in_a_sentence(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Runner, "trace", full)
    code, _, error = run("check", stage_folder("early"), "--device", "cpu")
    assert (code, error.strip().splitlines()[-1]) == (
        2, "error: The GPU's memory is full. Use fewer --micro-batch-tokens, or --device cpu."
    )  # fmt: skip
