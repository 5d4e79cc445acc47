"""A probe as tensors of a file, back from them, and the fingerprint of what they say."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from peelwise.errors import ProbeError
from peelwise.probe.examples import Examples, Loss
from peelwise.probe.rows import Split
from peelwise.probe.split import PARTS

_COLUMN = ".column."  # between the part and the name of a stored tensor of examples


def stored(splits: Mapping[str, Split], documents: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the tensors of some parts, as `Probe.to_tensors` describes them."""
    tensors: dict[str, Tensor] = {}
    for part, split in splits.items():
        if isinstance(split, Examples):
            tensors |= {f"{part}{_COLUMN}{name}": column for name, column in split.tensors()}
            continue
        mask = split.mask.cpu()
        tensors[f"{part}.ids"] = (split.ids.cpu() * mask).to(torch.int32).contiguous()
        tensors[f"{part}.lengths"] = mask.sum(dim=1).to(torch.int32)
        if split.asked is not None:
            tensors[f"{part}.asked"] = (split.asked.cpu() & mask).to(torch.uint8).contiguous()
        if documents is not None:
            tensors[f"{part}.documents"] = documents[part].to(torch.int32)
    return tensors


def restored(
    tensors: Mapping[str, Tensor], loss: Loss | None, unit: str
) -> tuple[dict[str, Split], dict[str, Tensor] | None]:
    """Return the parts that `stored` wrote, and the documents of their sequences where those were split.

    Args:
        tensors: from a file, which may be damaged.
        loss: of batches; see `Probe.from_batches`.
        unit: of that loss.

    Raises:
        ProbeError: If a tensor is missing, or its shape or values cannot be a probe.
    """
    if any(_COLUMN in key for key in tensors):
        return {part: Examples.of(_columns(tensors, part), loss, unit) for part in PARTS}, None
    splits = {}
    for part in PARTS:
        missing = [key for key in (f"{part}.ids", f"{part}.lengths") if key not in tensors]
        if missing:
            raise ProbeError(f"The stored probe lacks {missing[0]!r}: expected ids and lengths of {PARTS}.")
        ids, lengths = (_whole_numbers(tensors[f"{part}.{kind}"]) for kind in ("ids", "lengths"))
        fits = ids.ndim == 2 and ids.shape[1] > 1 and lengths.shape == ids.shape[:1] and ids.numel() > 0
        if not fits or int(lengths.min()) < 2 or int(lengths.max()) > ids.shape[1] or int(ids.min()) < 0:
            raise ProbeError(f"The stored probe is damaged: ids and lengths of {part!r} do not belong together.")
        splits[part] = Split(ids, torch.arange(ids.shape[1]) < lengths[:, None], _asked(tensors, part, ids))
    documents = {part: tensors[key].long() for part in PARTS if (key := f"{part}.documents") in tensors}
    if documents and {p: tuple(d.shape) for p, d in documents.items()} != {
        p: (split.sequences,) for p, split in splits.items()
    }:
        raise ProbeError("The stored probe is damaged: documents and sequences do not belong together.")
    return splits, documents or None


def fingerprint(splits: Mapping[str, Split], documents: Mapping[str, Tensor] | None) -> str:
    """Return the SHA-256 that `Probe.fingerprint` describes."""
    digest = hashlib.sha256()
    for part, split in splits.items():
        if isinstance(split, Examples):
            split.add_to(digest, part)
            continue
        mask = split.mask.cpu().long()
        digest.update(f"{part} {tuple(mask.shape)}\n".encode())
        for values in (split.ids.cpu().long() * mask, mask):
            digest.update(_bytes(values))
        if split.asked is not None:
            digest.update(_bytes(split.asked.cpu().long() * mask))
        if documents is not None:
            digest.update(_bytes(documents[part].cpu().long()))
    return digest.hexdigest()


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().numpy().astype("<i8", copy=False).tobytes()


def _whole_numbers(values: Tensor) -> Tensor:
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ProbeError(f"The stored probe is damaged: expected integers, got {values.dtype}.")
    return values.long()


def _columns(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    start = f"{part}{_COLUMN}"
    columns = {key.removeprefix(start): column for key, column in tensors.items() if key.startswith(start)}
    if not columns or any(column.dim() == 0 for column in columns.values()) or len({*map(len, columns.values())}) > 1:
        raise ProbeError(f"The stored probe is damaged: the tensors of {part!r} do not belong together.")
    if any(not len(column) for column in columns.values()):
        raise ProbeError(f"The stored probe is damaged: {part!r} has no example.")
    return columns


def _asked(tensors: Mapping[str, Tensor], part: str, ids: Tensor) -> Tensor | None:
    asked = tensors.get(f"{part}.asked")
    if asked is None:
        return None
    if asked.shape != ids.shape or bool((_whole_numbers(asked) > 1).any()) or not bool(asked[:, 1:].any(dim=1).all()):
        raise ProbeError(f"The stored probe is damaged: what is asked for of {part!r} does not belong to its ids.")
    return asked.bool()
