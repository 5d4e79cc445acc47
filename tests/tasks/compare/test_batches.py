"""Two models that predict no next tokens: effects are those of models built by hand, in the unit of their loss."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peelwise
from example_models import KINDS, Diffusion, noisy, pairs, t5
from peelwise.errors import UnsupportedModelError
from peelwise.model.architectures import find_blocks
from peelwise.tasks.compare.run import Candidate, run_compare
from peelwise.tasks.compare.settings import CompareSettings

ALL = CompareSettings(layers_of=9)


def squared(outputs: Tensor, batch: Any) -> Tensor:
    return (outputs - batch["noise"]).square().flatten(1).mean(dim=1)


MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    **{name: (*KINDS[name], {}) for name in ("masked", "classifier", "images")},
    "noise": (Diffusion, noisy, {"loss": squared, "unit": "squared error"}),
}


@torch.no_grad()
def moved(old: nn.Module, *blocks: int) -> nn.Module:
    """Return a copy in which the linear layers of some blocks have moved."""
    new = copy.deepcopy(old)
    for block in find_blocks(new):
        generator = torch.Generator().manual_seed(block.index)
        for linear in block.linears if block.index in blocks else ():
            weight = linear.module.weight
            weight.add_(0.3 * weight.std() * torch.randn(weight.shape, generator=generator))  # type: ignore[operator, union-attr]
    return new


@torch.no_grad()
def mean(model: nn.Module, probe: peelwise.Probe) -> float:
    """Return the loss that the model computes itself, one example at a time."""
    batch = probe.report.taken(probe.report.inputs)  # type: ignore[attr-defined]
    rows = [{name: column[i : i + 1] for name, column in batch.items()} for i in range(probe.report.sequences)]
    if "noise" in batch:
        inputs = [{name: column for name, column in row.items() if name != "noise"} for row in rows]
        return sum(squared(model(**i), row).item() for i, row in zip(inputs, rows, strict=True)) / len(rows)
    return sum(model(**row).loss.item() for row in rows) / len(rows)


@pytest.mark.parametrize("kind", MODELS)
def test_effects_are_those_of_models_put_together_by_hand(kind: str) -> None:
    make, batches, options = MODELS[kind]
    old = make().eval()
    new, probe = moved(old, 1, 3), peelwise.Probe.from_batches([batches()], **options)
    record = run_compare(Candidate(old, "old"), Candidate(new, "new"), probe, ALL)
    losses = mean(old, probe), mean(new, probe)
    assert (record.loss.old, record.loss.new) == pytest.approx(losses, abs=1e-5)
    assert record.margin_nats == pytest.approx(0.005 * min(losses))  # no floor of nats per token
    assert sorted(record.conclusion.changed) == [1, 3]
    assert record.first_difference is not None
    assert (record.first_difference.unit, record.first_difference.block) == ("block", 1)
    for index in (1, 3):
        mixed = moved(old, 4 - index)  # the other one alone
        assert record.blocks[index].repairs_nats is not None
        assert record.blocks[index].repairs_nats.mean == pytest.approx(losses[1] - mean(mixed, probe), abs=1e-5)
    assert all(end.kind_of_change == "unchanged" for end in record.ends)
    same = run_compare(Candidate(old, "old"), Candidate(copy.deepcopy(old), "copy"), probe, ALL)
    assert same.conclusion.case == "identical"


def test_a_head_that_moved_is_named() -> None:
    old, batches, _ = MODELS["classifier"][0](), MODELS["classifier"][1], None
    new = copy.deepcopy(old)
    with torch.no_grad():
        new.classifier.weight.mul_(-1)
    record = run_compare(Candidate(old, "old"), Candidate(new, "new"), peelwise.Probe.from_batches([batches()]), ALL)
    assert record.conclusion.changed == ()
    assert [end.unit for end in record.ends if end.kind_of_change == "sign"] == ["head"]


def test_a_certificate_holds_and_pages_are_in_the_unit(tmp_path: Path) -> None:
    old = Diffusion().eval()
    new = moved(old, 2)
    probe = peelwise.Probe.from_batches([noisy()], squared, unit="squared error")
    report = peelwise.compare(old, new, probe)
    page = report.save(tmp_path / "out").joinpath("report.html").read_text()
    assert "squared error" in page
    assert "nats per token" not in page
    assert "this text" not in page
    found = peelwise.verify(tmp_path / "out", new, old=old, loss=squared, full=True)
    assert found.holds, found.reason
    assert not peelwise.verify(tmp_path / "out", new, old=old, loss=lambda o, b: 2 * squared(o, b)).holds


def test_encoder_decoders_are_refused() -> None:
    old, probe = t5(), peelwise.Probe.from_batches([pairs()])
    with pytest.raises(UnsupportedModelError, match="What its encoder makes is given to every block"):
        run_compare(Candidate(old, "old"), Candidate(moved(old, 1), "new"), probe, ALL)
