"""Batches before they become a probe: put together by name, checked, and split by example."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peelwise.errors import FewSequencesWarning, ProbeError
from peelwise.probe.examples import IGNORED, LABELS, Examples, Loss
from peelwise.probe.sequences import FEWEST
from peelwise.probe.split import Pool, draw_parts

FEW_REPORT_EXAMPLES = 8
_LONGEST_UNIT = 40
_DTYPES = {
    *(torch.float64, torch.float32, torch.float16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


def split_examples(
    batches: Iterable[Mapping[str, Any]], loss: Loss | None, unit: str, shares: Sequence[float], seed: int
) -> tuple[tuple[Examples, Examples, Examples], Pool]:
    """Return the different examples of some batches in three parts, by hashes of their content, and what they are of.

    The arguments are those of `Probe.from_batches`.

    Raises:
        ProbeError: If a batch cannot be used, or there are fewer than 2 + 1 + 2 different examples.
    """
    if loss is not None and not callable(loss):
        raise ProbeError(f"loss: expected a function of (outputs, batch), got {type(loss).__name__}.")
    if not isinstance(unit, str) or not unit.strip().isprintable() or not 0 < len(unit.strip()) <= _LONGEST_UNIT:
        raise ProbeError(f"unit: expected a few words, at most {_LONGEST_UNIT} characters, got {str(unit)[:80]!r}.")
    columns = columns_of(batches)
    if loss is None:
        columns = _asked(columns)
    whole = Examples.of(columns, loss, unit.strip())
    rows = whole.rows()
    place_of = {tuple(row): place for place, row in reversed(list(enumerate(rows)))}
    if len(place_of) < sum(FEWEST):
        raise ProbeError(
            f"The batches give {len(place_of)} different examples, expected at least {sum(FEWEST)} (2 to fit, 1 to "
            "select, 2 to report). Give more batches."
        )
    drawn = draw_parts(rows, None, None, shares, seed)
    places = [torch.tensor([place_of[tuple(row)] for row in part]) for part in drawn.parts]
    if len(places[2]) < FEW_REPORT_EXAMPLES:
        warnings.warn(
            f"Only {len(places[2])} examples to report on, {FEW_REPORT_EXAMPLES} or more are advised: intervals will "
            "be wide. Give more batches.",
            FewSequencesWarning,
            stacklevel=4,
        )
    fit, select, report = (Examples.of(whole.taken(each[:, None]), loss, whole.unit) for each in places)
    return (fit, select, report), drawn.pool


def columns_of(batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the tensors of all batches by name, ``[examples, ...]`` on the CPU.

    Batches of different lengths, as collators make them, are filled up on the right where an ``attention_mask`` says
    what is read: labels with -100, other integers with 0.

    Raises:
        ProbeError: With the batch that cannot be used.
    """
    found = [_checked(batch, f"Batch {number}") for number, batch in enumerate(batches)]
    if not found:
        raise ProbeError("There are no batches: expected mappings of keyword arguments for the model's forward.")
    names = list(found[0])
    for number, batch in enumerate(found):
        if set(batch) != set(names):
            raise ProbeError(f"Batch {number} has {sorted(batch)}, the first one {sorted(names)}: expected the same.")
    masked = any(name.endswith("attention_mask") for name in names)
    return {name: _joined(name, [batch[name] for batch in found], masked=masked) for name in names}


def _checked(batch: Any, label: str) -> dict[str, Tensor]:
    """Return the tensors of one batch, which agree about the number of examples."""
    if not isinstance(batch, Mapping):
        raise ProbeError(
            f"{label}: expected a mapping of keyword arguments for the model's forward, got {type(batch).__name__}."
        )
    tensors = {name: value for name, value in batch.items() if value is not None}
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.dim() == 0:
            got = "a number" if isinstance(value, Tensor) else type(value).__name__
            raise ProbeError(f"{label}: {name}: expected a tensor with the examples in its first dimension, got {got}.")
        if value.dtype not in _DTYPES | {torch.bfloat16}:
            raise ProbeError(f"{label}: {name}: expected real numbers, integers or bool, got {value.dtype}.")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ProbeError(f"{label}: {name} holds NaN or Inf.")
    sizes = {name: len(value) for name, value in tensors.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        said = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "no tensor"
        raise ProbeError(f"{label}: its tensors must have the same number of examples, at least one; got {said}.")
    # Every float of bfloat16 is one of float32; NumPy, which hashes, does not know bfloat16.
    return {n: v.detach().cpu().to(torch.float32 if v.dtype is torch.bfloat16 else v.dtype) for n, v in tensors.items()}


def _joined(name: str, tensors: list[Tensor], *, masked: bool) -> Tensor:
    dtypes, ranks = {each.dtype for each in tensors}, {each.dim() for each in tensors}
    shapes = {tuple(each.shape[1:]) for each in tensors}
    if len(dtypes) > 1 or len(ranks) > 1 or (len(shapes) > 1 and not (masked and _can_be_filled(tensors[0]))):
        raise ProbeError(
            f"{name}: batches must agree about shape and dtype behind the first dimension, got {sorted(shapes)}. Only "
            "rows of integers beside an attention_mask can be of different lengths."
        )
    if len(shapes) == 1:
        return torch.cat(tensors)
    longest, fill = max(each.shape[1] for each in tensors), IGNORED if name == LABELS else 0
    return torch.cat([F.pad(each, (0, longest - each.shape[1]), value=fill) for each in tensors])


def _can_be_filled(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_floating_point()


def _asked(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the examples that have a label; without a loss, labels are what is asked for."""
    labels = columns.get(LABELS)
    if labels is None or labels.is_floating_point() or labels.dtype == torch.bool:
        got = "none" if labels is None else str(labels.dtype).removeprefix("torch.")
        raise ProbeError(
            f"Without a loss the batches need integer {LABELS!r}, got {got}. Give loss(outputs, batch) -> [examples]."
        )
    asked = (labels != IGNORED).reshape(len(labels), -1).any(dim=1)
    if not bool(asked.any()):
        raise ProbeError(f"All {LABELS} are {IGNORED}, so nothing is asked for.")
    return {name: column[asked] for name, column in columns.items()}
