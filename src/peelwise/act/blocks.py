"""Which modules are the blocks of a model, and which parameters are theirs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peelwise.errors import OptionError, UnsupportedModelError


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of ``torch.compile`` and DDP."""
    while True:
        wrapped = type(model).__name__ in ("OptimizedModule", "DistributedDataParallel")
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not wrapped or not isinstance(inner, nn.Module):
            return model
        model = inner


def block_modules(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the blocks of a model: the members of the ``nn.ModuleList`` that holds most parameters.

    Args:
        model: any module; wrappers of ``torch.compile`` and DDP are looked through.

    Raises:
        UnsupportedModelError: If there is no such list.
    """
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in unwrapped(model).named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists.append((name, module))
    if not lists:
        raise UnsupportedModelError(
            f"No blocks found in {type(model).__name__}: expected an nn.ModuleList of blocks. Give blocks=[..]."
        )
    return tuple(max(lists, key=lambda each: sum(p.numel() for p in each[1].parameters()))[1])


def block_parameters(model: nn.Module, blocks: Sequence[nn.Module] | None = None) -> list[list[nn.Parameter]]:
    """Return the parameters of every block, none of them in two.

    Args:
        model: what the blocks are part of.
        blocks: the blocks; default: `block_modules`.

    Raises:
        OptionError: If a parameter is not one of the model's, or two blocks share one.
    """
    own = {id(p) for p in model.parameters()}
    found = [list(block.parameters()) for block in (blocks if blocks is not None else block_modules(model))]
    seen: dict[int, int] = {}
    for index, members in enumerate(found):
        for p in members:
            if id(p) not in own:
                raise OptionError(f"blocks: block {index} has a parameter that the model does not have.")
            if id(p) in seen:
                raise OptionError(
                    f"Blocks {seen[id(p)]} and {index} share a parameter: it cannot have two rates or be frozen in one "
                    "of them alone. Give blocks=[..] that share none."
                )
            seen[id(p)] = index
    return found


def checked_index(index: object, count: int, what: str) -> int:
    """Return a block's index, or say that there is no such block.

    Raises:
        OptionError: If it is none.
    """
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < count:
        raise OptionError(f"{what}: there is no block {index!r}; expected 0 to {count - 1}.")
    return index
