"""Lists of blocks by their name: an encoder beside a decoder, one stage of several, the part that a text runs.

Only the blocks of one list are measured at a time. All else of the model is its ends: it runs by its own code, and what
a change of a block does to it, as to a decoder that reads what the encoder makes, is in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peelwise.errors import UnsupportedModelError
from peelwise.model.experts import layers_of
from peelwise.model.layers import Block, is_linear, linear_layers, plain_name, unwrapped

_NAMED = 8  # lists that an error names


def blocks_in(name: str, modules: nn.ModuleList) -> tuple[Block, ...]:
    """Return the modules of a list as blocks, each with its linear layers."""
    name = plain_name(name)
    return tuple(
        Block(index, f"{name}.{index}", module, tuple(linear_layers(unwrapped(module), f"{name}.{index}")))
        for index, module in enumerate(modules)
    )


def blocks_of(model: nn.Module, stack: str) -> tuple[Block, ...]:
    """Return the blocks of the list that is called ``stack``, such as ``encoder.block``.

    Raises:
        UnsupportedModelError: If there is none; the message names those that there are.
    """
    found = _lists(model)
    if stack not in found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks with linear layers called {stack[:80]!r}. It has "
            f"{_said(list(found))}."
        )
    return blocks_in(stack, found[stack])


def stack_of(blocks: Sequence[Block]) -> str:
    """Return the name of the list that blocks stand in."""
    return blocks[0].name.rpartition(".")[0]


def holds_linears(module: nn.Module) -> bool:
    """Whether there are linear layers or experts in a module."""
    return any(is_linear(each) or layers_of(each) for each in module.modules())


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model of transformers says that it is an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def in_decoder(model: nn.Module, blocks: Sequence[Block]) -> bool:
    """Whether blocks are those of a decoder beside an encoder."""
    if not is_encoder_decoder(model):
        return False
    getter = getattr(model, "get_encoder", None)
    encoder = getter() if callable(getter) else None
    inside = set() if encoder is None else {id(module) for module in encoder.modules()}
    return id(blocks[0].module) not in inside


def other_stacks(model: nn.Module, blocks: Sequence[Block]) -> dict[str, nn.ModuleList]:
    """Return by name the lists that run beside the one that is measured, as far as that is known.

    Of an encoder-decoder those of its other half; of a list in one of several stages those of the other stages.
    """
    own = stack_of(blocks)
    lists = _lists(model)
    inside = [name for name in lists if own.startswith(f"{name}.")]  # lists of stages
    if inside:
        stages = inside[-1]
        rest = own.removeprefix(f"{stages}.").partition(".")[2]
        found = [f"{stages}.{place}.{rest}" for place in range(len(lists[stages]))]
        return {name: lists[name] for name in found if name != own and name in lists}
    outermost = _outermost(list(lists)) if is_encoder_decoder(model) else []
    return {name: lists[name] for name in outermost if name != own}


def inner_lists(blocks: Sequence[Block]) -> tuple[str, ...]:
    """Return the names of lists of blocks that stand inside of blocks, as stages hold them."""
    found = {name: module for block in blocks for name, module in _lists(block.module, block.name).items()}
    return tuple(_outermost(list(found)))


def _lists(model: nn.Module, prefix: str = "") -> dict[str, nn.ModuleList]:
    """Return all lists of modules that hold a linear layer and are no lists of lists, by name."""
    return {
        plain_name(name): module
        for name, module in unwrapped(model).named_modules(prefix=prefix)
        if isinstance(module, nn.ModuleList)
        and len(module)
        and not any(isinstance(each, nn.ModuleList) for each in module)
        and holds_linears(module)
    }


def _outermost(names: Sequence[str]) -> list[str]:
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _said(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "") or "none"
