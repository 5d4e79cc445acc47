"""What identifies a model: a SHA-256 over its tensors and configuration; and whether all of them are finite."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peelwise.distributed.sharding import is_sharded, local_shard, whole
from peelwise.errors import ModelError
from peelwise.model.configuration import configuration
from peelwise.model.layers import plain_name
from peelwise.records.options import Plain

_PIECE = 1 << 22  # elements looked at together, so that no tensor is ever copied whole


@dataclass(frozen=True)
class Identity:
    """What a record says of which model it is about: its fingerprint, and the configuration that it is taken over."""

    fingerprint: str
    configuration: Plain


def identify(model: nn.Module) -> Identity:
    """Return the fingerprint of a model, and its configuration.

    Raises:
        ModelError: If a tensor has no values, as on the ``meta`` device.
    """
    found = configuration(model)
    return Identity(over_both(tensors_sha256(model), found), found)


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 over the tensors of a model and what else it computes with (`configuration`).

    Raises:
        ModelError: If a tensor has no values, as on the ``meta`` device.
    """
    return identify(model).fingerprint


def over_both(tensors: str, configured: Mapping[str, Any]) -> str:
    """Return the SHA-256 over that of the tensors and a configuration, as JSON with sorted keys."""
    return hashlib.sha256(f"{tensors}\n{json.dumps(dict(configured), sort_keys=True)}".encode()).hexdigest()


def tensors_sha256(model: nn.Module) -> str:
    """Return the SHA-256 over name, shape, dtype and bytes of every tensor of the state, sorted by name.

    Tied tensors count under each of their names; buffers that are not saved do not count. The device and the
    memory layout make no difference. Records of old have this as their fingerprint. Of a model that is spread over
    processes all of them ask at once: one tensor after the other is gathered.

    Raises:
        ModelError: If a tensor has no values, as on the ``meta`` device.
    """
    return sha256_of(_tensors(model))


def sha256_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 over name, shape, dtype and bytes of tensors, sorted; of quantised ones, their parts."""
    digest = hashlib.sha256()
    plain = [part for name, tensor in tensors for part in _parts(name, tensor)]
    for name, tensor in sorted(plain, key=lambda each: each[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        for piece in _pieces(whole(tensor)):
            digest.update(piece.cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_finite(model: nn.Module) -> None:
    """Raise if any parameter or saved buffer holds NaN or Inf.

    Raises:
        ModelError: Names the first such tensor and how many of its values are affected.
    """
    for name, tensor in _tensors(model):
        if not tensor.is_floating_point():
            continue
        small = tensor.element_size() < 2  # eight-bit numbers can be compared with nothing
        pieces = (piece.float() if small else piece for piece in _pieces(local_shard(tensor)))
        bad = sum(piece.numel() - int(piece.isfinite().sum()) for piece in pieces)
        if bad:
            raise ModelError(
                f"{name} holds {bad} of {tensor.numel()} values that are NaN or Inf. "
                "Give a checkpoint without them, such as one from before training diverged."
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):  # extra state of a module, not a weight
            continue
        if tensor.is_meta:
            raise ModelError(f"{name} has no values (meta device): load or gather the weights first.")
        yield from _parts(plain_name(name), tensor.detach())


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds its own numbers, not those of others (torch's protocol for quantised ones)."""
    return not hasattr(tensor, "__tensor_flatten__") or is_sharded(tensor)


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor, or the plain ones (codes, scales, zero points) of which a quantised one is made."""
    if is_plain(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield from _parts(f"{name}.{part}", getattr(tensor, part))


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.contiguous().reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        yield flat[start : start + _PIECE]
