"""How blocks are called: where the hidden state stands among their arguments, and in what they return."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from peelwise.distributed.sharding import gathers
from peelwise.errors import UnsupportedModelError
from peelwise.model.layers import Block
from peelwise.model.replaced import forward_replaced


def without_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], module: nn.Module | None = None
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Take the hidden state out of the arguments of a block: the first of them, or the keyword that stands for it."""
    if args and isinstance(args[0], Tensor):
        return args[0], tuple(args[1:]), dict(kwargs)
    rest = dict(kwargs)
    name = _hidden_keyword(rest)
    if args or name is None or (module is not None and not _comes_first(module, name)):
        what = "the block" if module is None else type(module).__name__
        given = ", ".join([*(type(a).__name__ for a in args), *kwargs])
        raise UnsupportedModelError(
            f"{what} is called with ({given}); expected the hidden state as its first argument, one tensor."
        )
    return rest.pop(name), (), rest


def _hidden_keyword(kwargs: dict[str, Any]) -> str | None:
    if "hidden_states" in kwargs:
        return "hidden_states"
    return next((k for k, v in kwargs.items() if isinstance(v, Tensor) and v.dim() == 3), None)


def _comes_first(module: nn.Module, name: str) -> bool:
    return name == "hidden_states" or next(iter(inspect.signature(module.forward).parameters), None) == name


def replaced_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a block with ``change`` made to the hidden state among them."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name = _hidden_keyword(kwargs)
    assert name is not None  # `without_hidden` has found it before
    return args, kwargs | {name: change(kwargs[name])}


def hidden_of(out: Any) -> Tensor:
    """Return the hidden state that a block returned: its result, or the first of several."""
    hidden = out[0] if isinstance(out, (tuple, list)) and out else out
    if not isinstance(hidden, Tensor):
        raise UnsupportedModelError(
            f"A block returns {type(out).__name__}; expected its hidden state, or a tuple or list that begins with it."
        )
    return hidden


def uncached(argument: Any) -> Any:
    """Return an argument of a block, but no cache of keys and values, which would grow with every further call."""
    return None if callable(getattr(argument, "get_seq_length", None)) else argument


@contextmanager
def skipping(blocks: Sequence[Block], hidden: Tensor, rest: tuple[Any, ...] | list[Any] | None) -> Iterator[None]:
    """Let every block return its input and the last one ``hidden``, so that only the model's ends run.

    Blocks that are spread over processes are not gathered for that.
    """
    out = _like(rest, hidden)
    with ExitStack() as stack:
        for block in blocks:
            last = block is blocks[-1]
            forward = (lambda *a, **k: out) if last else _identity(rest)
            stack.enter_context(forward_replaced(block.module, forward, hooks=not gathers(block.module)))
        yield


def _identity(rest: tuple[Any, ...] | list[Any] | None) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, _, _ = without_hidden(args, kwargs)
        return _like(rest, hidden)

    return forward


def _like(rest: tuple[Any, ...] | list[Any] | None, hidden: Tensor) -> Any:
    """Return a hidden state in the way that the blocks return theirs."""
    if rest is None:
        return hidden
    return [hidden, *rest] if isinstance(rest, list) else (hidden, *rest)
