"""Probes of batches: split by example, the same for the same tensors, and refused in a sentence otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from peelwise.errors import FewSequencesWarning, ProbeError
from peelwise.probe.examples import Examples, labelled_loss
from peelwise.probe.probe import Probe
from peelwise.probe.split import PARTS
from peelwise.records.files import _probe_fingerprint

Batch = dict[str, Any]


def batch(examples: int = 24, length: int = 6, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (examples, length), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, ids, -100)
    labels[:, 0] = ids[:, 0]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def parts_of(probe: Probe) -> list[Examples]:
    parts = [getattr(probe, part) for part in PARTS]
    assert all(isinstance(part, Examples) for part in parts)
    return parts


def test_every_example_is_in_one_part_with_all_of_its_tensors() -> None:
    whole = batch(40)
    probe = Probe.from_batches([{k: v[:25] for k, v in whole.items()}, {k: v[25:] for k, v in whole.items()}])
    found = [part.taken(part.inputs) for part in parts_of(probe)]
    together = {name: torch.cat([each[name] for each in found]) for name in whole}
    ids = [tuple(row) for row in together["input_ids"].tolist()]
    assert sorted(ids) == sorted(tuple(row) for row in whole["input_ids"].tolist())
    assert len(set(ids)) == 40
    place_of = {tuple(row): place for place, row in enumerate(whole["input_ids"].tolist())}
    assert torch.equal(together["labels"], whole["labels"][[place_of[row] for row in ids]])
    record = probe.record()
    assert (record.fit_sequences, record.select_sequences, record.report_sequences) == (20, 6, 14)
    assert (record.unit, record.loss) == ("loss", "labels")
    assert probe.split_faults() is None


def test_equal_examples_count_once_and_are_not_in_two_parts() -> None:
    one = batch(24)
    twice = Probe.from_batches([one, one])
    assert sum(part.sequences for part in parts_of(twice)) == 24
    assert twice.fingerprint == Probe.from_batches([one]).fingerprint
    assert twice.split_faults() is None
    moved = Probe(twice.fit, twice.select, twice.fit, "batches", pool=twice.pool)
    assert "more than once" in str(moved.split_faults())


def test_the_split_follows_from_content_and_seed_not_from_the_order() -> None:
    one = batch(30)
    turned = {name: column.flip(0) for name, column in one.items()}
    assert Probe.from_batches([one]).fingerprint == Probe.from_batches([turned]).fingerprint
    assert Probe.from_batches([one]).fingerprint != Probe.from_batches([one], seed=1).fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b | {"labels": b["labels"].roll(1, 0)},
        lambda b: {("token_type_ids" if k == "attention_mask" else k): v for k, v in b.items()},
        lambda b: b | {"attention_mask": b["attention_mask"].float()},
    ],
    ids=["values", "names", "dtypes"],
)
def test_the_fingerprint_is_over_values_names_and_dtypes(change: Callable[[Batch], Batch]) -> None:
    assert Probe.from_batches([batch()]).fingerprint != Probe.from_batches([change(batch())]).fingerprint


def test_what_is_stored_comes_back_and_can_be_told_without_torch(tmp_path: Any) -> None:
    pixels = {"pixel_values": torch.randn(24, 3, 4, 4), "labels": torch.arange(24) % 3}
    probe = Probe.from_batches([pixels], seed=3)
    path = tmp_path / "probe.safetensors"
    save_file(probe.to_tensors(), path)
    again = Probe.from_tensors(load_file(path), source="batches", seed=3, pool=probe.pool)
    assert again.fingerprint == probe.fingerprint == _probe_fingerprint(path)
    assert again.split_faults() is None
    assert again.record() == probe.record()


def test_what_is_asked_for_of_tokens_is_told_without_torch_too(tmp_path: Any) -> None:
    ids = torch.randint(1, 50, (24, 6))
    probe = Probe.from_tokens(ids.tolist(), labels=torch.where(ids % 2 == 0, ids, -100).tolist())
    path = tmp_path / "probe.safetensors"
    save_file(probe.to_tensors(), path)
    assert _probe_fingerprint(path) == probe.fingerprint


def test_batches_of_several_lengths_are_filled_up_where_a_mask_says_what_is_read() -> None:
    short, long = batch(12, 4), batch(12, 7, seed=1)
    probe = Probe.from_batches([short, long])
    columns = {name: torch.cat([p.taken(p.inputs)[name] for p in parts_of(probe)]) for name in short}
    assert {tuple(column.shape) for column in columns.values()} == {(24, 7)}
    filled = columns["attention_mask"].sum(dim=1) == 4
    assert int(filled.sum()) == 12
    assert bool((columns["labels"][filled][:, 4:] == -100).all())
    assert bool((columns["input_ids"][filled][:, 4:] == 0).all())
    without = [{k: v for k, v in each.items() if k != "attention_mask"} for each in (short, long)]
    with pytest.raises(ProbeError, match="batches must agree about shape"):
        Probe.from_batches(without)


def test_the_usual_loss_is_the_mean_over_the_labels_that_count() -> None:
    logits, labels = torch.randn(3, 5, 7, requires_grad=True), torch.randint(0, 7, (3, 5))
    labels[0, 1:] = labels[1, 0] = -100
    found = labelled_loss(logits, {"labels": labels})
    expected = [cross_entropy(logits[i], labels[i], ignore_index=-100) for i in range(3)]
    assert torch.allclose(found, torch.stack(expected))
    found.sum().backward()
    assert logits.grad is not None
    assert bool((logits.grad[0, 1:] == 0).all())
    assert torch.allclose(
        labelled_loss(logits[:, 0], {"labels": labels[:, 2].clamp_min(0)}),
        cross_entropy(logits[:, 0], labels[:, 2].clamp_min(0), reduction="none"),
    )


def test_examples_without_a_label_are_left_out() -> None:
    one = batch(27)
    one["labels"][:3] = -100
    assert sum(part.sequences for part in parts_of(Probe.from_batches([one]))) == 24


def test_few_examples_to_report_on_are_said() -> None:
    with pytest.warns(FewSequencesWarning, match="Only 4 examples to report on"):
        Probe.from_batches([batch(12)])


def summed(outputs: Any, columns: Any) -> Tensor:
    return outputs.sum()


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "empty": (lambda: Probe.from_batches([]), "There are no batches"),
    "no mapping": (lambda: Probe.from_batches(batch()), "Batch 0: expected a mapping .* got str"),
    "no tensor": (lambda: Probe.from_batches([batch() | {"task": "ner"}]), "Batch 0: task: expected a tensor .* str"),
    "a number": (lambda: Probe.from_batches([batch() | {"t": torch.tensor(1)}]), "t: expected a tensor .* a number"),
    "sizes": (lambda: Probe.from_batches([batch() | {"t": torch.ones(5)}]), "same number of examples.*t 5"),
    "no example": (lambda: Probe.from_batches([batch(0)]), "at least one"),
    "names": (lambda: Probe.from_batches([batch(), {"labels": torch.arange(4)}]), "Batch 1 has"),
    "dtype": (lambda: Probe.from_batches([batch(), batch() | {"labels": torch.ones(24, 6)}]), "about shape and dtype"),
    "NaN": (lambda: Probe.from_batches([batch() | {"x": torch.full((24, 2), torch.nan)}]), "x holds NaN"),
    "complex": (lambda: Probe.from_batches([batch() | {"x": torch.zeros(24, dtype=torch.complex64)}]), "complex64"),
    "few": (lambda: Probe.from_batches([batch(4)]), "4 different examples, expected at least 5"),
    "no labels": (lambda: Probe.from_batches([{"input_ids": torch.arange(9)}]), "Without a loss .* got none"),
    "scores": (lambda: Probe.from_batches([{"labels": torch.rand(9)}]), "Without a loss .* got float32"),
    "nothing asked": (lambda: Probe.from_batches([{"labels": torch.full((9,), -100)}]), "nothing is asked for"),
    "loss": (lambda: Probe.from_batches([batch()], "mse"), "loss: expected a function"),
    "unit": (lambda: Probe.from_batches([batch()], unit="a\nb"), "unit: expected a few words"),
    "shares": (lambda: Probe.from_batches([batch()], shares=(1, 1)), "three positive shares"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_a_probe_is_refused_in_a_line_or_two(case: str) -> None:
    make, said = BAD[case]
    with pytest.raises(ProbeError) as caught:
        make()
    assert re.search(said, str(caught.value)), str(caught.value)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (summed, r"returned \(\) for 12 examples; expected a tensor \[12\]"),
        (lambda outputs, columns: outputs, r"returned \(12, 4\)"),
        (lambda outputs, columns: 0.5, "returned float"),
        (lambda outputs, columns: columns["target"], "raised KeyError: 'target'"),
    ],
)
def test_a_loss_that_is_not_one_number_an_example_is_refused(loss: Any, said: str) -> None:
    examples = Examples.of({"x": torch.randn(12, 4)}, loss, "loss")
    with pytest.raises(ProbeError, match=said):
        examples.losses(torch.randn(12, 4), examples.columns)


def test_labels_that_do_not_belong_to_the_logits_are_refused() -> None:
    with pytest.raises(ProbeError, match=r"need logits \(3, 5, 'classes'\) .* got \(3, 7\)"):
        labelled_loss(torch.randn(3, 7), {"labels": torch.zeros(3, 5, dtype=torch.long)})


def test_damaged_files_of_examples_are_refused() -> None:
    tensors = Probe.from_batches([batch()]).to_tensors()
    short = tensors | {"fit.column.labels": tensors["fit.column.labels"][1:]}
    missing = {key: value for key, value in tensors.items() if not key.startswith("report")}
    for damaged in (short, missing):
        with pytest.raises(ProbeError, match="damaged"):
            Probe.from_tensors(damaged, source="batches")
