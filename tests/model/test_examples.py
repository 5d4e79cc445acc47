"""Models run on batches: losses are their own, gradients those of plain autograd, and what cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import peelwise
from example_models import KINDS, bert, classified, images, masked, pairs, same_as_autograd, t5, vit, words
from peelwise.engine.opening import checked_blocks, open_session
from peelwise.engine.sweep import block_moments
from peelwise.errors import ModelError, NotDifferentiableError, ProbeError, UnsupportedModelError
from peelwise.model.architectures import find_blocks, other_stacks
from peelwise.model.guard import untouched
from peelwise.model.parts import parts_of
from peelwise.model.runner import Runner
from peelwise.model.selfcheck import self_check
from peelwise.model.splice import frozen
from peelwise.probe.probe import Probe
from peelwise.tasks.peel.run import run_peel
from peelwise.tasks.peel.settings import PeelSettings


def own_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss that the model computes itself, one example at a time."""
    with torch.no_grad():
        rows = [{name: column[i : i + 1] for name, column in batch.items()} for i in range(len(batch["labels"]))]
        return torch.stack([model(**row).loss for row in rows]).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro_batch", [30, 1024])
def test_losses_are_the_models_own_whole_and_block_by_block(kind: str, micro_batch: int) -> None:
    make, batches = KINDS[kind]
    model, probe = make(), Probe.from_batches([batches()])
    with untouched(model):
        runner = Runner(model, find_blocks(model), micro_batch_tokens=micro_batch)
        trace = runner.trace(probe.fit)
        own = own_losses(model, probe.fit.taken(probe.fit.inputs))  # type: ignore[attr-defined]
        assert torch.allclose(trace.losses, own, atol=1e-5)
        assert torch.allclose(runner.losses_from(trace, 0), own, atol=1e-5)
        assert torch.allclose(runner.losses_from(trace, 3), own, atol=1e-5)
        assert not torch.allclose(runner.losses_without(trace, 2), own, atol=1e-3)
        assert trace.mean == pytest.approx(float(own.mean()), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_gradients_are_those_of_plain_autograd(kind: str) -> None:
    """``C`` of a layer times the examples is the gradient of the summed loss by its weight and bias, padding or not."""
    make, batches = KINDS[kind]
    model, probe = make(), Probe.from_batches([batches()])
    columns = probe.fit.taken(probe.fit.inputs)  # type: ignore[attr-defined]
    blocks = find_blocks(model)
    logits, labels = model(**columns).logits, columns["labels"]
    each = cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="none")
    counted = (labels != -100).reshape(len(labels), -1)
    (each.view(len(labels), -1).sum(1) / counted.sum(1)).mean().backward()
    with untouched(model), frozen([linear for block in blocks for linear in block.linears]):
        runner = Runner(model, blocks, micro_batch_tokens=100)
        self_check(runner, probe.fit)
        trace = runner.trace(probe.fit)
        compared = same_as_autograd(runner, trace)
    assert compared == sum(len(block.linears) for block in runner.blocks) >= 5 * 6


def test_positions_that_the_mask_leaves_out_do_not_count() -> None:
    model, probe = bert(), Probe.from_batches([masked()])
    with untouched(model):
        runner = Runner(model, find_blocks(model))
        trace = runner.trace(probe.fit)
    mask = probe.fit.taken(probe.fit.inputs)["attention_mask"].bool()  # type: ignore[attr-defined]
    assert torch.equal(torch.cat([batch.read for batch in trace.batches]), mask)
    assert 0 < int(mask.sum()) < mask.numel()
    moments, _ = block_moments(runner, runner.blocks[0], trace, [runner.tail_gradients(trace)], keep=True, with_F=False)
    assert {found.n for found in moments[0].values()} == {int(mask.sum())}


def test_of_an_encoder_decoder_the_blocks_are_those_of_the_decoder_and_the_others_are_said() -> None:
    model = t5()
    blocks = find_blocks(model)
    assert [block.name for block in blocks] == [f"decoder.block.{i}" for i in range(5)]
    assert list(other_stacks(model, blocks)) == ["encoder.block"]
    assert [branch.name for branch in parts_of(blocks[0]).branches] == ["attention", "cross-attention", "mlp"]
    # The encoder's mask is as long as the decoder's rows here, and says nothing of them.
    batch = words(length=7) | {"labels": pairs()["labels"]}
    probe = Probe.from_batches([batch])
    with untouched(model):
        trace = Runner(model, blocks).trace(probe.fit)
    assert all(bool(each.read.all()) for each in trace.batches)


def session_of(model: nn.Module, probe: Probe) -> Any:
    with untouched(model):
        blocks = checked_blocks(model, probe, batches=True)
        return open_session(
            model, blocks, probe, name="it", budget_seconds=60, micro_batch_tokens=1024, watcher=None
        )  # fmt: skip


def test_notes_say_what_is_left_out() -> None:
    codes = {note.code: note.values for note in session_of(t5(), Probe.from_batches([pairs()])).notes}
    assert codes["own-loss"] == {}
    assert codes["encoder-left-out"] == {"names": "encoder.block"}
    assert {note.code for note in session_of(bert(), Probe.from_batches([masked()])).notes} == {"own-loss"}


class Shifted(nn.Module):
    """Returns a loss of its own that is not that of its logits and labels."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit()

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        out = self.vit(pixel_values=pixel_values, labels=labels)
        out.loss = out.loss + 0.1
        return out


class Half(nn.Module):
    """A block that hands on every other position."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)[:, ::2]


class Halving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([Half(), Half()])
        self.head = nn.Linear(8, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = pixel_values[:, 0]
        for block in self.h:
            x = block(x)
        return self.head(x.mean(dim=1))


def squared(outputs: Any, batch: Any) -> Tensor:
    return (outputs.logits - batch["wanted"]).square().mean(dim=1)


def wanted(examples: int = 24) -> dict[str, Tensor]:
    return {"pixel_values": images(examples)["pixel_values"], "wanted": torch.zeros(examples, 10)}


REFUSED: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "another loss of its own": (Shifted, lambda: Probe.from_batches([images()]), UnsupportedModelError,
        "computes a loss of .* the cross-entropy of its logits"),
    "several resolutions": (Halving, lambda: Probe.from_batches([images()]), UnsupportedModelError,
        r"the blocks of Halving hand on \[1, 2, \.\.\], \[1, 4, \.\.\], \[1, 8, \.\.\], expected the same"),
    "no such argument": (vit, lambda: Probe.from_batches([{"pixels": torch.rand(24, 9), "labels": torch.arange(24)}]),
        UnsupportedModelError, "could not be called with pixels, labels as keyword arguments"),
    "no gradient": (vit, lambda: Probe.from_batches([wanted()], lambda o, b: squared(o, b).detach()),
        NotDifferentiableError, "has no gradient: compute it with torch"),
    "NaN": (vit, lambda: Probe.from_batches([wanted()], lambda o, b: squared(o, b) / 0), ModelError,
        "loss of it on the batches is (inf|nan)"),
    "below 0": (vit, lambda: Probe.from_batches([wanted()], lambda o, b: -squared(o, b)), ModelError,
        "must not be below 0. Add a constant"),
    "one number": (vit, lambda: Probe.from_batches([wanted()], lambda o, b: squared(o, b).mean()), ProbeError,
        r"returned \(\) for 1 examples"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_models_and_losses_that_do_not_fit_are_refused(case: str) -> None:
    make, probe, error, said = REFUSED[case]
    with pytest.raises(error, match=said):
        session_of(make(), probe())


def test_text_runs_no_encoder_decoder_and_batches_no_peel() -> None:
    ids = torch.randint(3, 60, (24, 12))
    with pytest.raises(UnsupportedModelError, match=r"encoder-decoder .*Probe.from_batches"):
        peelwise.check(t5(), Probe.from_tokens(ids.tolist()))
    with pytest.raises(ProbeError, match=r"peelwise.check, audit, compare and Monitor take"):
        run_peel(bert(), Probe.from_batches([classified()]), PeelSettings())
