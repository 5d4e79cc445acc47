"""The errors for models that cannot be run block by block, each with what was seen."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from peelwise.errors import NotDifferentiableError, UnsupportedModelError
from peelwise.model.gradients import not_differentiable
from peelwise.model.layers import Block
from peelwise.model.trace import Batch


def not_once(model: nn.Module, blocks: Sequence[Block], runs: Sequence[int], batch: Batch) -> UnsupportedModelError:
    """Return the error for blocks that did not run once each, in order; ``runs`` are the numbers of those that ran."""
    if not runs:
        where = "text: its text model is" if batch.examples is None else "these batches: they are for"
        return UnsupportedModelError(
            f"Not yet: none of {blocks[0].name} and the other {len(blocks) - 1} blocks is called when "
            f"{type(model).__name__} runs on {where} another part of it."
        )
    return UnsupportedModelError(
        f"Not yet: {type(model).__name__} runs its {len(blocks)} blocks {len(runs)} times per forward pass; expected "
        "each of them at most once, in order."
    )


def other_shapes(model: nn.Module, shapes: Collection[tuple[int, ...]], inner: Sequence[str]) -> UnsupportedModelError:
    """Return the error for blocks that hand on hidden states of several shapes; ``inner`` are lists inside of them."""
    said = ", ".join(f"[{', '.join(map(str, shape))}, ..]" for shape in sorted(shapes))
    advice = f" Measure one list of blocks at a time, such as stack={inner[-1]!r}." if inner else ""
    return UnsupportedModelError(
        f"Not yet: the blocks of {type(model).__name__} hand on {said}, expected the same [examples, positions, ..] "
        f"throughout.{advice}"
    )


def too_few_logits(model: nn.Module, logits: Tensor, batch: Batch) -> UnsupportedModelError:
    """Return the error for a model whose logits are not those of every position."""
    return UnsupportedModelError(
        f"{type(model).__name__} returns logits of {logits.shape[1]} positions for {batch.inputs.shape[1]} tokens; "
        "peelwise needs those of every position. Wrap the model in one that returns them all."
    )


def no_gradient(model: nn.Module, batch: Batch) -> NotDifferentiableError:
    """Return the error for a loss without a gradient."""
    if batch.examples is None:
        return not_differentiable(type(model).__name__)
    return NotDifferentiableError(
        "The loss of the batches has no gradient: compute it with torch from what the model returns, without detach, "
        "item or argmax."
    )
