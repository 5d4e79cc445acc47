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

from peelwise.evidence.facts import BatchFacts
from peelwise.tasks.monitor.padding import NONE, PaddingWatch, Runs, runs_of
from peelwise.tasks.monitor.uncopied import Uncopied

_AT_A_TIME = 1024  # tokens whose logits are turned into losses
_MOST_TOKENS = 65_536  # of a step; what comes later is not looked at
_LATE = 32  # sequences that count as of late
_REMEMBERED = 100_000
_MULTIPLIER = 6364136223846793005
_IGNORED = -100


class BatchWatch:
    """Looks at one step's forward passes: `before` it, and `after` it.

    Args:
        model: that training calls.
        reads: whether it predicts next tokens, so that its passes can be read; else nothing is looked at.

    Attributes:
        seconds: taken inside of the passes so far.
    """

    def __init__(self, model: nn.Module, *, reads: bool = True) -> None:
        self._model, self._reads = model, reads
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._sums: list[Tensor] = []
        self._edges: list[Tensor] = []
        self._inside: list[Tensor] = []
        self._hashes: list[Tensor] = []
        self._tokens = 0
        self._padding = PaddingWatch()
        self._seen: Counter[int] = Counter()
        self._late: deque[bool] = deque(maxlen=_LATE)
        self.seconds = 0.0

    def before(self) -> None:
        """Look at the forward passes from now on; not where a hook would make the model compile again."""
        self.drop()
        if not self._reads or getattr(self._model, "_compiled_call_impl", None) is not None:
            return
        self._handles.append(self._model.register_forward_hook(_Look(self), with_kwargs=True))

    def drop(self) -> None:
        """Look no more, and forget what was seen."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._sums, self._hashes, self._tokens = [], [], [], 0
        self._edges, self._inside = [], []

    def after(self) -> BatchFacts | None:
        """Return what the passes since `before` would cost; ``None`` if they could not be read."""
        sums, hashes, edges, inside = self._sums, self._hashes, self._edges, self._inside
        self.drop()
        if not sums:
            return None
        for row in torch.cat(hashes).tolist():
            self._late.append(row in self._seen)
            self._seen[row] += 1
        if len(self._seen) > _REMEMBERED:
            self._seen = Counter(dict(list(self._seen.items())[-_REMEMBERED // 2 :]))
        total = torch.stack(sums).sum(dim=0).tolist()  # of the next token, the one after it, the same one
        means = [loss / max(count, 1.0) for loss, count in total]
        rows = torch.cat(edges)
        self._padding.add(rows[..., :2], torch.cat(inside))
        token, (loss, count) = self._padding.token, total[0]
        filled = rows[rows[..., 0] == token].sum(dim=0).tolist() if token is not None else [0.0] * 6
        left = count - filled[3]
        unpadded = (loss - filled[2]) / left if left else means[0]
        others = count - filled[5]
        labelled_first = (loss - filled[4]) / others if others else means[0]
        late = len(self._late), sum(self._late), len(self._seen)
        return BatchFacts(means[0], means[1], means[2], unpadded, filled[3] / max(count, 1.0), *late, labelled_first)

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
            runs = runs_of(ids)
            sums, edges = _losses(logits.detach(), ids, asked, runs)
            self._sums.append(sums)
            self._edges.append(edges)
            self._inside.append(torch.where(runs.inside, ids.long(), NONE).flatten())
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


def _losses(logits: Tensor, ids: Tensor, asked: Tensor | None, runs: Runs) -> tuple[Tensor, Tensor]:
    """Return summed losses and numbers of targets, of all and of those in runs at the ends of rows.

    Args:
        logits: ``[batch, length, vocabulary]``.
        ids: ``[batch, length]``.
        asked: which tokens count as targets, where that is known.
        runs: of the ids.

    Returns ``[3, 2]``: loss and number with the next token as target, the one after it, the same one; and
    ``[batch, 2, 6]``: for a row's end and beginning the token repeated there, how often, the losses of the targets
    among these, and their number; and loss and number of the first of them, at a row's end.
    """
    ids = ids.long()
    asked = torch.ones_like(ids, dtype=torch.bool) if asked is None else asked
    sums = torch.zeros(3, 2, dtype=torch.float64, device=ids.device)
    edges = torch.zeros(len(ids), 2, 6, dtype=torch.float64, device=ids.device)
    for side, (run, token) in enumerate(((runs.last, ids[:, -1]), (runs.first, ids[:, 0]))):
        edges[:, side, 0] = torch.where(run.any(dim=1), token, NONE).double()
        edges[:, side, 1] = run.sum(dim=1).double()
    for start in range(0, ids.shape[0], step := max(1, _AT_A_TIME // ids.shape[1])):
        rows = slice(start, start + step)
        log_p = logits[rows].float().log_softmax(dim=-1)
        for column, ahead in enumerate((1, 2, 0)):
            targets, counted = ids[rows, ahead:], asked[rows, ahead:]
            losses = -log_p[:, : targets.shape[1]].gather(-1, targets[..., None])[..., 0] * counted
            sums[column] += torch.stack([losses.sum(), counted.sum()])
            if ahead == 1:
                for side, run in enumerate((runs.last[rows, 1:], runs.first[rows, 1:])):
                    edges[rows, side, 2] = (losses * run).sum(dim=1).double()
                    edges[rows, side, 3] = (counted & run).sum(dim=1).double()
                begins = runs.last[rows, 1:] & ~runs.last[rows, :-1]
                edges[rows, 0, 4] = (losses * begins).sum(dim=1).double()
                edges[rows, 0, 5] = (counted & begins).sum(dim=1).double()
    return sums, edges


def _hashes(ids: Tensor) -> Tensor:
    """Return a number for every row, ``[batch]``, that hardly any other row has."""
    powers = torch.full((ids.shape[1],), _MULTIPLIER, dtype=torch.int64, device=ids.device).cumprod(dim=0)
    return ((ids.long() + 1) * powers).sum(dim=1)
