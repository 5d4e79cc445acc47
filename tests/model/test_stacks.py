"""Lists of blocks by name: encoders beside decoders and stages of several resolutions, measured as all else is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import peelwise
from example_models import larger_images, pairs, same_as_autograd, swin, t5, vit
from peelwise.errors import UnsupportedModelError
from peelwise.model.architectures import find_blocks, in_decoder, other_stacks, stack_of
from peelwise.model.guard import untouched
from peelwise.model.runner import Runner
from peelwise.model.selfcheck import self_check
from peelwise.model.splice import frozen, spliced
from peelwise.records.base import Note

ENCODER, STAGE = "encoder.block", "swin.encoder.layers.1.blocks"
CASES: dict[str, tuple[Any, Any, str, tuple[str, ...]]] = {
    "encoder": (t5, pairs, ENCODER, ("decoder.block",)),
    "decoder": (t5, pairs, "decoder.block", (ENCODER,)),
    "stage": (swin, larger_images, STAGE, ("swin.encoder.layers.0.blocks",)),
    "first stage": (swin, larger_images, "swin.encoder.layers.0.blocks", (STAGE,)),
}
QUICK = peelwise.AuditSettings("60s", 1, 1, controls=False)


def own_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        rows = [{name: column[i : i + 1] for name, column in batch.items()} for i in range(len(batch["labels"]))]
        return torch.stack([model(**row).loss for row in rows]).double()


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_whole_model(case: str) -> None:
    make, batches, stack, others = CASES[case]
    model, probe = make(), peelwise.Probe.from_batches([batches()])
    blocks = find_blocks(model, stack)
    assert stack_of(blocks) == stack
    assert tuple(other_stacks(model, blocks)) == others
    assert in_decoder(model, blocks) is (case == "decoder")
    columns = probe.fit.taken(probe.fit.inputs)  # type: ignore[attr-defined]
    logits, labels = model(**columns).logits, columns["labels"]
    each = cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="none")
    counted = (labels != -100).reshape(len(labels), -1)
    (each.view(len(labels), -1).sum(1) / counted.sum(1)).mean().backward()
    with untouched(model), frozen([linear for block in blocks for linear in block.linears]):
        runner = Runner(model, blocks, micro_batch_tokens=100)
        assert runner.head_share > 0  # what runs beside the blocks costs something
        self_check(runner, probe.fit)
        trace = runner.trace(probe.fit)
        own = own_losses(model, columns)
        assert torch.allclose(trace.losses, own, atol=1e-5)
        assert torch.allclose(runner.losses_from(trace, 0), own, atol=1e-5)
        compared = same_as_autograd(runner, trace)
        # A change of the first block is in everything behind it, whichever stack that stands in.
        linear = runner.blocks[0].linears[-1]
        change = torch.zeros_like(linear.weight())
        change[0] = 0.5
        padded = nn.functional.pad(change, (0, int(linear.has_bias)))
        with spliced({linear: padded}):
            hooked = runner.losses_from(trace, 0)
    assert compared >= 10
    written = copy.deepcopy(model)
    with torch.no_grad():
        written.get_submodule(linear.name).weight.add_(change)  # type: ignore[operator]
    assert torch.allclose(hooked, own_losses(written, columns), atol=1e-5)
    assert not torch.allclose(hooked, own, atol=1e-4)


def test_positions_of_an_encoder_are_those_of_its_own_mask() -> None:
    model, probe = t5(), peelwise.Probe.from_batches([pairs()])
    with untouched(model):
        trace = Runner(model, find_blocks(model, ENCODER)).trace(probe.fit)
    mask = probe.fit.taken(probe.fit.inputs)["attention_mask"].bool()  # type: ignore[attr-defined]
    assert torch.equal(torch.cat([batch.read for batch in trace.batches]), mask)
    assert 0 < int(mask.sum()) < mask.numel()


@pytest.mark.parametrize("case", ["encoder", "stage"])
def test_an_audit_of_a_list_holds_and_says_what_it_left_out(case: str, tmp_path: Path) -> None:
    make, batches, stack, others = CASES[case]
    model, probe = make(), peelwise.Probe.from_batches([batches(60)])
    settings = peelwise.AuditSettings("60s", 1, 1, controls=False, stack=stack)
    report = peelwise.audit(model, probe, settings)
    assert [block.name for block in report.record.blocks] == [block.name for block in find_blocks(model, stack)]
    notes = {note.code: note.values for note in report.record.notes if isinstance(note, Note)}
    assert notes["stacks-left-out"] == {"names": ", ".join(others), "stack": stack}
    assert report.record.settings["stack"] == stack
    assert report.record.loss.composed_gain is not None
    report.save(tmp_path / "out")
    found = peelwise.verify(tmp_path / "out", model, full=True, replay=True)
    assert found.holds, found.reason


def test_a_check_of_an_encoder_finds_its_damage(tmp_path: Path) -> None:
    model = t5()
    with torch.no_grad():  # a healthy encoder is random here, and one of its blocks writes a hundred times as much
        for linear in find_blocks(model, ENCODER)[1].linears:
            linear.module.weight.mul_(10)  # type: ignore[operator, union-attr]
    probe = peelwise.Probe.from_batches([pairs(60)])
    report = peelwise.check(model, probe, peelwise.CheckSettings(stack=ENCODER))
    assert [block.name for block in report.record.blocks] == ["encoder.block.0", "encoder.block.1"]
    report.save(tmp_path / "out")
    assert peelwise.verify(tmp_path / "out", model, full=True).holds


def test_a_monitor_follows_an_encoder() -> None:
    model, probe = t5().train(), peelwise.Probe.from_batches([pairs(40)], in_distribution=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    monitor = peelwise.Monitor(
        model, probe, optimizer=optimizer, budget=None, schedule=peelwise.every(1), store=None, stack=ENCODER
    )
    for step in range(4):
        loss = model(**pairs(8, seed=step)).loss
        loss.backward()
        optimizer.step()
        assert monitor.step(step, loss=loss.item()) is not None
        optimizer.zero_grad()
    monitor.close()
    assert monitor.last is not None
    assert len(monitor.last.letters) == 2
    assert not [event for event in monitor.events if event.kind in ("not-measured", "blocks-changed")]


def test_what_cannot_be_is_said_with_the_lists_that_there_are() -> None:
    probe = peelwise.Probe.from_batches([larger_images()])
    with pytest.raises(UnsupportedModelError, match=r"stack='swin\.encoder\.layers\.1\.blocks'"):
        peelwise.audit(swin(), probe, QUICK)
    with pytest.raises(UnsupportedModelError, match=r"called 'layers'\. It has vit\.layers\."):
        find_blocks(vit(), "layers")
