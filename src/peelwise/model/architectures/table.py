"""The architectures: each is a function that finds the blocks of a model of its kind."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from peelwise.errors import UnsupportedModelError
from peelwise.model.architectures import decoder
from peelwise.model.layers import Block

# The first that knows the model names its blocks; ``None`` says that the model is of another kind. The last takes any
# list of blocks of one class, and refuses what it does not know with a message that names what was found.
ARCHITECTURES: tuple[Callable[[nn.Module], tuple[Block, ...] | None], ...] = (decoder.find_blocks,)


def find_blocks(model: nn.Module) -> tuple[Block, ...]:
    """Return the blocks of ``model``, each with its linear layers in the order of the modules.

    Raises:
        UnsupportedModelError: If no architecture of the table has them; the message names what was found.
    """
    for find in ARCHITECTURES:
        blocks = find(model)
        if blocks is not None:
            return blocks
    raise UnsupportedModelError(f"No blocks found in {type(model).__name__}.")
