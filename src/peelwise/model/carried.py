"""Weights that lie in one memory and are computed with in another: copied there by each operation that reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class Carried(Tensor):
    """A tensor that says it is on one device and holds its numbers on another, or in a file.

    Views of it hold views of the same numbers, so that nothing is copied before something is computed, and then only
    what is looked at. It is never written: an operation that would is refused.

    Attributes:
        held: the numbers.
        place: where it says that it is.
    """

    held: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Carried:
        """Return a tensor that says it is on ``device``."""
        made: Carried = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=device
        )
        made.held, made.place = held, device
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Look at the numbers where they are, or compute with a copy where they are to be."""
        kwargs = kwargs or {}
        if func.is_view:
            place = next(arg.place for arg in args if isinstance(arg, cls))
            seen = func(*tree_map(_held, args), **tree_map(_held, kwargs))
            return tree_map(lambda view: cls(view, place) if isinstance(view, Tensor) else view, seen)
        if any(isinstance(arg, cls) for arg in _written(func, args, kwargs)):
            raise RuntimeError(f"{func} would write an offloaded weight.")
        return func(*tree_map(_there, args), **tree_map(_there, kwargs))

    def data_ptr(self) -> int:
        """Return where the numbers are."""
        return self.held.data_ptr()

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        """Return the numbers in the computer's memory, without the way over the device."""
        return self.held.cpu()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return a copy that is where this one says that it is."""
        made = self.held.to(self.place, copy=True)
        memo[id(self)] = made = nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        """Return where it says that it is, without reading it."""
        return f"Carried({list(self.shape)}, {self.dtype}, from {self.held.device} to {self.place})"


def _held(one: Any) -> Any:
    return one.held if isinstance(one, Carried) else one


def _there(one: Any) -> Any:
    return one.held.to(one.place) if isinstance(one, Carried) else one


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that an operation writes."""
    of_schema = func._schema.arguments
    given = {about.name: arg for about, arg in zip(of_schema, args, strict=False)} | kwargs
    return [given.get(about.name) for about in of_schema if about.alias_info is not None and about.alias_info.is_write]
