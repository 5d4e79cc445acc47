"""The monitor beside trainings of models that predict no next tokens: classes, hidden tokens, images, pairs, noise."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peelwise
from example_models import KINDS, Diffusion, bert_classifier, classified, digits, noisy, trained_vit
from peelwise.engine.baselines import probe_labels
from peelwise.loggers.console import Console
from peelwise.model.architectures import find_blocks
from peelwise.show.dashboard import queries
from peelwise.show.notebook import measurement_html
from peelwise.store.reader import RunReader

STEPS, EVERY = 12, 2  # six measurements: every kind of them
_FAILED = ("not-measured", "not-followed", "signals-left-out")


def squared(outputs: Tensor, batch: Any) -> Tensor:
    return (outputs - batch["noise"]).square().flatten(1).mean(dim=1)


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    if "noise" in batch:
        inputs = {name: column for name, column in batch.items() if name != "noise"}
        return squared(model(**inputs), batch).mean()
    return model(**batch).loss


def train(
    model: nn.Module,
    batches: Any,
    probe: peelwise.Probe | None,
    *,
    steps: int = STEPS,
    rate: float = 1e-3,
    **options: Any,
) -> tuple[list[float], peelwise.Monitor | None]:
    """Train in place and return the losses, and the monitor if there was one."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    settings = {"budget": None, "schedule": peelwise.every(EVERY), "store": None} | options
    monitor = None if probe is None else peelwise.Monitor(model, probe, optimizer=optimizer, **settings)
    losses = []
    for step in range(1, steps + 1):
        loss = own_loss(model, batches(8, seed=step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if monitor is not None:
            monitor.step(step, loss=losses[-1])
        optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
    return losses, monitor


TRAININGS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    **{name: (make, batches, {}) for name, (make, batches) in KINDS.items()},
    "noise": (Diffusion, noisy, {"loss": squared, "unit": "squared error"}),
}


@pytest.mark.parametrize("kind", TRAININGS)
def test_it_measures_every_kind_of_model_and_changes_nothing(kind: str, tmp_path: Path) -> None:
    make, batches, options = TRAININGS[kind]
    probe = peelwise.Probe.from_batches([batches(40, seed=99)], in_distribution=True, **options)
    watched, alone = make().train(), make().train()
    seen: list[tuple[int, float, float]] = []

    def compare(found: Any) -> None:
        """Beside what was measured, the loss that the model itself computes on the same examples at that moment."""
        split = probe.report
        batch = split.taken(split.inputs)  # type: ignore[attr-defined]
        rows = [{name: column[i : i + 1] for name, column in batch.items()} for i in range(split.sequences)]
        flags, state = [m.training for m in watched.modules()], torch.get_rng_state()
        with torch.no_grad():
            own = [own_loss(watched.eval(), row).item() for row in rows]
        for module, flag in zip(watched.modules(), flags, strict=True):
            module.training = flag
        torch.set_rng_state(state)
        seen.append((found.step, found.probe_loss, sum(own) / len(own)))

    losses, monitor = train(
        watched, batches, probe, store=tmp_path / "run.db", on_measurement=compare, signals=("all",)
    )
    assert monitor is not None
    assert losses == train(alone, batches, None)[0]
    assert all(torch.equal(one, other) for one, other in zip(watched.parameters(), alone.parameters(), strict=True))
    assert [step for step, _, _ in seen] == list(range(EVERY, STEPS + 1, EVERY))
    assert all(measured == pytest.approx(own, rel=1e-4) for _, measured, own in seen)
    assert not [event for event in monitor.events if event.kind in _FAILED]
    # Rules that read next tokens in training's batches have nothing to say of these.
    assert not [e for e in monitor.events if e.kind in ("labels-shifted", "padding-in-loss", "repeated-data", "leak")]
    last = monitor.last
    assert last is not None
    assert last.unit == probe.unit == options.get("unit", "loss")
    with RunReader(tmp_path / "run.db") as reader:
        run = reader.latest()
        assert run.info.probe["unit"] == probe.unit
        names = {row["name"] for row in reader.statistic_names(run.id)}
        assert {"recoverable", "unique", "composed", "natural_energy", "gain_slope", "unlikeness"} <= names
        assert "bound_upper" not in names  # a new head would be one of next tokens
        page = queries.overview(reader, run)
        assert queries.run_facts(run, "k", "f")["unit"] == probe.unit
    units = {each["name"]: each["unit"] for each in page["statistics"]}
    assert units["recoverable"] == probe.unit
    assert units["natural_energy"] == f"{probe.unit} per unit step"
    assert f"{probe.unit} on the probe" in measurement_html(last, run.info.blocks)
    stream = io.StringIO()
    Console(stream).measurement(last)
    assert f"{last.probe_loss:.4f} {probe.unit} on the probe" in stream.getvalue()


def test_counting_labels_costs_what_their_shares_say() -> None:
    batch = classified(200)
    probe = peelwise.Probe.from_batches([batch])
    parts = [part.taken(part.inputs)["labels"].tolist() for part in (probe.fit, probe.select, probe.report)]  # type: ignore[attr-defined]
    fit, select, report = parts
    highest = max(map(max, parts)) + 1

    def cost(labels: list[int], pseudo: float) -> float:
        shares = [(fit.count(each) + pseudo) / (len(fit) + pseudo * highest) for each in range(highest)]
        return -sum(math.log(shares[label]) for label in labels) / len(labels)

    best = min((0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0), key=lambda pseudo: cost(select, pseudo))
    assert probe_labels(probe) == pytest.approx(cost(report, best))
    assert probe_labels(peelwise.Probe.from_batches([noisy()], squared)) is None
    assert probe_labels(peelwise.Probe.from_tokens([[1, 2, 3, i] for i in range(40)])) is None


@pytest.mark.parametrize(("rate", "is_worse"), [(3e-3, False), (2.0, True)])
def test_a_classifier_that_is_worse_than_counting_labels_is_told(rate: float, is_worse: bool) -> None:
    probe = peelwise.Probe.from_batches([classified(60, seed=99)], in_distribution=True)
    _, monitor = train(bert_classifier().train(), classified, probe, steps=90, rate=rate)
    assert monitor is not None
    told = [event for event in monitor.events if event.kind == "worse-than-counting"]
    assert bool(told) is is_worse
    assert all("counting labels" in event.text for event in told)


def drawn(examples: int, seed: int) -> dict[str, Tensor]:
    pixels, labels = digits()
    rows = torch.randint(1200, (8 * examples,), generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels[rows], "labels": labels[rows]}


def test_a_block_that_no_longer_learns_turns_red_in_the_unit_of_the_loss() -> None:
    """One block of a trained model is spoiled, and a rate of nought mends nothing. A healthy one has no red block."""
    pixels, labels = digits()
    probe = peelwise.Probe.from_batches(
        [{"pixel_values": pixels[:400], "labels": labels[:400]}], in_distribution=True, unit="nats per image"
    )
    healthy = trained_vit()
    spoiled = copy.deepcopy(healthy)
    writer = find_blocks(spoiled)[3].linears[-1].module
    with torch.no_grad():
        writer.weight.neg_()  # type: ignore[operator, union-attr]

    def reds(model: nn.Module) -> list[Any]:
        _, monitor = train(model.train(), drawn, probe, steps=40, rate=0.0, schedule=peelwise.every(20))
        assert monitor is not None
        return [event for event in monitor.events if event.kind == "red"]

    assert not reds(healthy)
    found = reds(spoiled)
    assert any(event.block == 3 or "(3" in event.text for event in found)
    assert all("recoverable (nats per image)" in event.text for event in found)
