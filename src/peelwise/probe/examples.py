"""Examples: what a model's forward is called with by keyword, and a loss of one number for each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peelwise.errors import PeelwiseError, ProbeError
from peelwise.probe.rows import Split

Loss = Callable[[Any, Mapping[str, Tensor]], Tensor]
LABELS, IGNORED = "labels", -100
# Numbers of an image that count as one position, until the model says how many it makes of it: 16 x 16 in 3 colours.
_PATCH = 768


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


@dataclass(frozen=True, eq=False)
class Examples(Split):
    """Examples in the place of sequences.

    Each counts as a sequence of one token to predict, whose id is its place in the columns. So whatever is counted,
    split, shuffled or paired by sequence is so by example.

    Args:
        columns: What the model is called with by name, ``[examples, ...]``; what its forward does not take is for the
            loss alone.
        loss: Maps what the model returns and the columns of some examples to the loss ``[examples]`` of each; ``None``
            for `labelled_loss`.
        unit: What the loss is in.
    """

    columns: Mapping[str, Tensor] = field(default_factory=dict)
    loss: Loss | None = None
    unit: str = "loss"

    @classmethod
    def of(cls, columns: Mapping[str, Tensor], loss: Loss | None, unit: str) -> Self:
        """Return all examples of some columns, in their order."""
        count = len(next(iter(columns.values())))
        places = torch.arange(count)[:, None].expand(count, 2)  # [examples, 2]: what is read, and what is predicted
        return cls(places, torch.ones_like(places, dtype=torch.bool), columns=columns, loss=loss, unit=unit)

    @property
    def width(self) -> int:
        """Positions that a model makes of an example, as far as its columns tell."""
        sizes = [(column[0].numel(), column.is_floating_point()) for column in self.columns.values()]
        return max(-(-numbers // _PATCH) if floating else numbers for numbers, floating in sizes)

    def to(self, device: torch.device | str) -> Self:
        """Return the same examples on ``device``."""
        columns = {name: column.to(device) for name, column in self.columns.items()}
        return replace(self, ids=self.ids.to(device), mask=self.mask.to(device), columns=columns)

    def rows(self) -> list[list[int]]:
        """Return the SHA-256 of every example's tensors, as eight numbers that stand for its ids."""
        own = self.taken(self.inputs)
        heads = {name: f"{name} {_dtype(column)} {tuple(column.shape[1:])}\n".encode() for name, column in own.items()}
        arrays = {name: column.cpu().numpy() for name, column in sorted(own.items())}
        digests = (
            hashlib.sha256(b"".join(heads[name] + array[place].tobytes() for name, array in arrays.items())).digest()
            for place in range(self.sequences)
        )
        return [np.frombuffer(digest, dtype="<u4").tolist() for digest in digests]

    def taken(self, places: Tensor) -> dict[str, Tensor]:
        """Return the columns of the examples at ``places [b, 1]``, on the device of the columns."""
        return {name: column[places[:, 0].to(column.device)] for name, column in self.columns.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the columns by name, on the CPU."""
        own = self.taken(self.inputs)
        yield from ((name, own[name].cpu().contiguous()) for name in sorted(own))

    def add_to(self, digest: _Digest, part: str) -> None:
        """Add names, dtypes, shapes and bytes of all columns to a digest."""
        digest.update(f"{part} {self.sequences}\n".encode())
        for name, column in self.tensors():
            digest.update(f"{name} {_dtype(column)} {tuple(column.shape)}\n".encode())
            digest.update(column.numpy().tobytes())

    def losses(self, outputs: Any, columns: Mapping[str, Tensor]) -> Tensor:
        """Return the loss ``[b, 1]`` of each of some examples, in the graph where gradients are on.

        Args:
            outputs: what the model returned for them.
            columns: theirs, or those of other examples with whose targets they are compared.

        Raises:
            ProbeError: If the loss cannot be computed, or is not one number for each example.
        """
        count = len(next(iter(columns.values())))
        try:
            found = (self.loss or labelled_loss)(outputs, columns)
        except PeelwiseError:
            raise
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            said = (str(error).strip().splitlines() or ["no message"])[0][:200]
            raise ProbeError(f"loss(outputs, batch) raised {type(error).__name__}: {said}") from error
        if not isinstance(found, Tensor) or found.shape != (count,):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ProbeError(
                f"loss(outputs, batch) returned {got} for {count} examples; expected a tensor [{count}], the loss of "
                "each. Take the mean over every dimension but the first."
            )
        return found[:, None]

    def positions(self, columns: Mapping[str, Tensor], station: Tensor, *, decoder: bool) -> Tensor:
        """Return which positions count for the statistics of layers, ``[b, t]`` bool: all but padding, if that is said.

        Args:
            columns: of the examples.
            station: what enters the blocks, ``[b, t, d]``.
            decoder: whether the blocks are those of a decoder beside an encoder, which has a mask of its own.
        """
        mask = columns.get("decoder_attention_mask" if decoder else "attention_mask")
        if mask is None or mask.shape != station.shape[:2]:
            return torch.ones(station.shape[:2], dtype=torch.bool, device=station.device)
        return mask.to(station.device).bool()


def labelled_loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy ``[examples]`` of each example's labels, those of -100 left out, in nats.

    Args:
        outputs: logits ``[examples, .., classes]``, or something with such ``logits``.
        batch: with ``labels [examples, ..]``.

    Raises:
        ProbeError: If logits and labels do not belong together.
    """
    logits, labels = getattr(outputs, "logits", outputs), batch[LABELS]
    if not isinstance(logits, Tensor) or logits.shape[:-1] != labels.shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ProbeError(
            f"Labels {tuple(labels.shape)} need logits {(*labels.shape, 'classes')} to be compared with, got {got}. "
            "Give Probe.from_batches a loss."
        )
    labels = labels.long()
    each = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    counted = (labels != IGNORED).reshape(len(labels), -1)
    return each.view(len(labels), -1).sum(dim=1) / counted.sum(dim=1)


def _dtype(column: Tensor) -> str:
    return str(column.dtype).removeprefix("torch.")
