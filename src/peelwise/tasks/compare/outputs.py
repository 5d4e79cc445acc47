"""Which parts compute something else for the same input, and whether their weights explain it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from peelwise.model.layers import unwrapped
from peelwise.model.trace import batch_first, by_token
from peelwise.records.compare import Unit
from peelwise.tasks.compare.mixing import Side, end_logits, like

# What rounding may leave between two ways of computing the same, relative to what a part adds to its input.
_ROUNDING, _HALF_ROUNDING = 1e-4, 2e-2


@dataclass(frozen=True)
class Outputs:
    """How far a part's output is from OLD's for the same inputs, relative to what OLD's part adds to them.

    ``same`` is up to rounding. ``same_code`` says that OLD's code computes the same with NEW's weights; ``None`` where
    that cannot be tried, because the weights are kept in another way.
    """

    distance: float
    same: bool
    same_code: bool | None


@torch.no_grad()
def block_outputs(old: Side, new: Side, index: int, *, same_weights: bool) -> Outputs:
    """Compare the outputs of one block in both models at the stations of NEW.

    ``|f_old(H) - f_new(H)| / |f_old(H) - H|`` over the tokens of report; the same for OLD's code with NEW's weights.

    Args:
        old: one model.
        new: the other one, whose stations are the inputs.
        index: of the block.
        same_weights: whether all weights of the block are equal; then one comparison says it all.
    """
    distance, code, added = 0.0, 0.0, 0.0
    tried = not same_weights
    for place, batch in enumerate(new.trace.batches):
        hidden, out = batch.stations[index], batch.stations[index + 1].float()
        real = batch.attended
        theirs = old.block(index, place, hidden, batch.handed_to(index)).float()
        distance += _square(theirs - out, real)
        added += _square(theirs - hidden.float(), real)
        again = _with_weights_of(old, new, index, place, hidden) if tried else None
        tried = tried and again is not None
        code += 0.0 if again is None else _square(again.float() - out, real)
    runner = new.runner
    runner.work.add(runner.shares[index], new.trace.predicted, 2 if tried else 1)
    scale = max(added, torch.finfo(torch.float32).tiny)
    relative, of_code = (distance / scale) ** 0.5, (code / scale) ** 0.5
    limit = _limit(old, new)
    same = relative <= limit
    return Outputs(relative, same, same if same_weights else of_code <= limit if tried else None)


def _with_weights_of(old: Side, new: Side, index: int, place: int, hidden: Tensor) -> Tensor | None:
    """Return what OLD's code computes with NEW's weights, or ``None`` if these go by other names or shapes."""
    module = unwrapped(old.blocks[index].module)
    own = dict(module.named_parameters())
    theirs = dict(unwrapped(new.blocks[index].module).named_parameters())
    if own.keys() != theirs.keys() or any(own[n].shape != theirs[n].shape for n in own):
        return None
    batch = old.trace.batches[place]
    call = batch.calls[index]
    if call is None:
        return like(hidden, batch)  # skipped
    args, kwargs = batch.ways.with_handed(call, new.trace.batches[place].handed_to(index))
    weights = {name: p.to(own[name]) for name, p in theirs.items()}
    out = functional_call(module, weights, (like(hidden, batch), *args), kwargs)
    found: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return found


def of_end(distance: float, old: Side, new: Side, *, same_weights: bool) -> Outputs:
    """Return what a distance says of an end of the model; whose code it is cannot be tried apart from its weights."""
    same = distance <= _limit(old, new)
    return Outputs(distance, same, same if same_weights else None)


@torch.no_grad()
def end_outputs(old: Side, new: Side) -> dict[Unit, float]:
    """Return how far each end's output is from OLD's for the same input, relative to OLD's output.

    Of the embedding that is station 0, of norm and head the logits for NEW's last station. These cost a head each, so
    norm and head are told apart only where both together differ.
    """
    together = _relative(old, new, "embedding"), _relative(old, new, "head", norm=old)
    apart = new.runner.head is not None and old.runner.head is not None
    if not apart or together[1] <= _limit(old, new):
        return {"embedding": together[0], "norm": together[1], "head": together[1]}
    return {
        "embedding": together[0],
        "norm": _relative(old, new, "norm", norm=old),
        "head": _relative(old, new, "head", norm=new),
    }


def _relative(old: Side, new: Side, unit: Unit, norm: Side | None = None) -> float:
    distance = own = 0.0
    for place, batch in enumerate(new.trace.batches):
        if norm is None:
            theirs, ours = (side.trace.batches[place].stations[0].float() for side in (old, new))
        else:
            hidden, head = batch.stations[-1], old if unit == "head" else new
            theirs = end_logits(norm, head, place, hidden).float()
            ours = end_logits(new, new, place, hidden).float()
            new.runner.work.add(new.runner.head_share, float(batch.weights.sum()), 2)
        # What a model makes of an example need not have a row for every position.
        theirs, ours = (batch_first(rows, batch.attended) for rows in (theirs, ours))
        each = batch.attended.shape in (theirs.shape[:2], theirs.shape[1:3]) and theirs.dim() > 2
        real = batch.attended if each else batch.weights[:, 0]
        distance += _square(theirs - ours, real)
        own += _square(theirs, real)
    return (distance / own) ** 0.5 if own else 0.0


def _limit(old: Side, new: Side) -> float:
    exact = (torch.float32, torch.float64)
    both = (side.trace.batches[0].stations[0].dtype for side in (old, new))
    return _ROUNDING if all(dtype in exact for dtype in both) else _HALF_ROUNDING


def _square(rows: Tensor, real: Tensor) -> float:
    """Return the sum of squares ``[b, t, d]`` over real positions ``[b, t]``, or ``[b, ..]`` over real rows ``[b]``."""
    return float((by_token(rows, real) if real.dim() > 1 else rows[real]).double().square().sum())
