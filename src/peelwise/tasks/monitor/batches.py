"""What training's own forward pass of one step saw, and what the same logits would cost under other labels.

Read by hooks that stand for one step alone, so that at all other times a model in training is as it was.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peelwise.evidence.mistakes import BatchFacts
from peelwise.tasks.monitor.uncopied import Uncopied

_AT_A_TIME = 1024  # tokens whose logits are turned into losses
_MOST_TOKENS = 65_536  # of a step; what comes later is not looked at
_LATE = 64  # sequences that count as of late
_REMEMBERED = 100_000
_MULTIPLIER = 6364136223846793005
_IGNORED = -100


class BatchWatch:
    """Looks at one step's forward passes: `before` it, and `after` it.

    Args:
        model: that training calls.

    Attributes:
        seconds: taken inside of the passes so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._sums: list[Tensor] = []
        self._hashes: list[Tensor] = []
        self._tokens = 0
        self._seen: Counter[int] = Counter()
        self._late: deque[bool] = deque(maxlen=_LATE)
        self.seconds = 0.0

    def before(self) -> None:
        """Look at the forward passes from now on; not where a hook would make the model compile again."""
        self.drop()
        if getattr(self._model, "_compiled_call_impl", None) is not None:
            return
        self._handles.append(self._model.register_forward_hook(_Look(self), with_kwargs=True))

    def drop(self) -> None:
        """Look no more, and forget what was seen."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._sums, self._hashes, self._tokens = [], [], [], 0

    def after(self) -> BatchFacts | None:
        """Return what the passes since `before` would cost; ``None`` if they could not be read."""
        sums, hashes = self._sums, self._hashes
        self.drop()
        if not sums:
            return None
        for row in torch.cat(hashes).tolist():
            self._late.append(row in self._seen)
            self._seen[row] += 1
        if len(self._seen) > _REMEMBERED:
            self._seen = Counter(dict(list(self._seen.items())[-_REMEMBERED // 2 :]))
        total = torch.stack(sums).sum(dim=0).tolist()  # losses and counts of: next, twice, same, unpadded
        means = [loss / max(count, 1.0) for loss, count in zip(total[:4], total[4:], strict=True)]
        padding = 1 - total[7] / max(total[4], 1.0)
        unpadded = means[3] if total[7] else means[0]
        late = len(self._late), sum(self._late), len(self._seen)
        return BatchFacts(means[0], means[1], means[2], unpadded, padding, *late)

    @torch.no_grad()
    def look(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """Read one forward pass."""
        start = time.monotonic()
        ids, logits = _ids(args, kwargs), _logits(out)
        fits = ids is not None and logits is not None and logits.shape[:2] == ids.shape and ids.shape[1] > 2
        if ids is not None and logits is not None and fits and self._tokens < _MOST_TOKENS:
            self._tokens += ids.numel()
            labels = kwargs.get("labels")
            asked = labels != _IGNORED if isinstance(labels, Tensor) and labels.shape == ids.shape else None
            self._sums.append(_losses(logits.detach(), ids, asked))
            self._hashes.append(_hashes(ids))
        self.seconds += time.monotonic() - start


class _Look(Uncopied):
    """The hook; copies of the model, in memory or on disk, do without it."""

    def __init__(self, watch: BatchWatch) -> None:
        self._watch = watch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if torch.compiler.is_compiling() or not module.training or not torch.is_grad_enabled():
            return
        try:
            self._watch.look(args, kwargs, out)
        except Exception:  # whatever goes wrong here, the training must not end of it
            self._watch.drop()


def _ids(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the token ids ``[batch, length]`` that a model was called with."""
    given = [kwargs[name] for name in ("input_ids", "idx", "tokens") if name in kwargs] or [*args, *kwargs.values()]
    found = (t for t in given if isinstance(t, Tensor) and t.dim() == 2 and t.dtype in (torch.int64, torch.int32))
    return next(found, None)


def _logits(out: Any) -> Tensor | None:
    logits = getattr(out, "logits", out.get("logits") if isinstance(out, dict) else out)
    logits = logits[0] if isinstance(logits, (tuple, list)) and logits else logits
    return logits if isinstance(logits, Tensor) and logits.dim() == 3 else None


def _losses(logits: Tensor, ids: Tensor, asked: Tensor | None) -> Tensor:
    """Return summed losses and numbers of targets, ``[8]``: the next token, the one after it, the same one, no padding.

    Args:
        logits: ``[batch, length, vocabulary]``.
        ids: ``[batch, length]``.
        asked: which tokens count as targets, where that is known.
    """
    ids = ids.long()
    asked = torch.ones_like(ids, dtype=torch.bool) if asked is None else asked
    real = asked & ~_padding(ids)
    sums = torch.zeros(8, dtype=torch.float64, device=ids.device)
    for start in range(0, ids.shape[0], step := max(1, _AT_A_TIME // ids.shape[1])):
        rows = slice(start, start + step)
        log_p = logits[rows].float().log_softmax(dim=-1)
        for column, (ahead, mask) in enumerate(((1, asked), (2, asked), (0, asked), (1, real))):
            targets, counted = ids[rows, ahead:], mask[rows, ahead:]
            losses = -log_p[:, : targets.shape[1]].gather(-1, targets[..., None])[..., 0]
            sums[column] += (losses * counted).sum()
            sums[column + 4] += counted.sum()
    return sums


def _padding(ids: Tensor) -> Tensor:
    """Return where a row ends or begins in one token again and again, ``[batch, length]``."""
    last = (ids == ids[:, -1:]).flip(1).long().cumprod(dim=1).flip(1).bool()
    first = (ids == ids[:, :1]).long().cumprod(dim=1).bool()
    runs = [run & (run.sum(dim=1, keepdim=True) > 1) for run in (last, first)]
    return runs[0] | runs[1]


def _hashes(ids: Tensor) -> Tensor:
    """Return a number for every row, ``[batch]``, that hardly any other row has."""
    powers = torch.full((ids.shape[1],), _MULTIPLIER, dtype=torch.int64, device=ids.device).cumprod(dim=0)
    return ((ids.long() + 1) * powers).sum(dim=1)
