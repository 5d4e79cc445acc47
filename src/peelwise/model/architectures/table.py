"""The architectures: each is a function that finds the blocks of a model of its kind."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from peelwise.errors import UnsupportedModelError
from peelwise.model.architectures import decoder
from peelwise.model.architectures.stacks import blocks_of
from peelwise.model.layers import Block

# The first that knows the model names its blocks; ``None`` says that the model is of another kind. The last takes any
# list of blocks of one class, and refuses what it does not know with a message that names what was found.
ARCHITECTURES: tuple[Callable[[nn.Module], tuple[Block, ...] | None], ...] = (decoder.find_blocks,)


def find_blocks(model: nn.Module, stack: str | None = None) -> tuple[Block, ...]:
    """Return the blocks of ``model``, each with its linear layers in the order of the modules.

    Args:
        model: any.
        stack: the name of the list that they stand in; ``None`` for the one that its architecture says.

    Raises:
        UnsupportedModelError: If no architecture of the table has them, or no list is called so; the message names what
            was found.
    """
    if stack is not None:
        return blocks_of(model, stack)
    for find in ARCHITECTURES:
        blocks = find(model)
        if blocks is not None:
            return blocks
    raise UnsupportedModelError(f"No blocks found in {type(model).__name__}.")
