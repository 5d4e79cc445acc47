"""All knowledge of architectures: which modules are the blocks, the linear maps in them, and the head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peelwise.errors import FormatError, UnsupportedModelError
from peelwise.model.effective import Held, held, is_low_bit

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


@dataclass(frozen=True, eq=False)
class LinearMap:
    """One linear map ``y = x W^T + b`` of a block, whatever way its module stores ``W``."""

    name: str  # full name in the model
    module: nn.Module
    transposed: bool  # the module keeps W as [d_in, d_out] (transformers' Conv1D)

    @property
    def has_bias(self) -> bool:
        """Whether the map adds a bias; then its change has one more column."""
        return isinstance(getattr(self.module, "bias", None), Tensor)

    @property
    def low_bit(self) -> bool:
        """Whether the map computes with weights of a low-bit format."""
        return is_low_bit(self.module)

    def held(self) -> Held | None:
        """Return codes, scales and format of a low-bit map, ``None`` for any other; see `peelwise.model.effective`."""
        try:
            return held(self.module)
        except (FormatError, UnsupportedModelError) as error:
            raise type(error)(f"{self.name}: {error}") from error

    def weight(self) -> Tensor:
        """Return the weight that the map computes with, ``[d_out, d_in]``, never to be written.

        A view of the parameter, or what the codes of a low-bit map stand for.
        """
        found = self.held()
        if found is not None:
            return found.weight
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().T if self.transposed else weight.detach()

    def bias(self) -> Tensor | None:
        """Return the bias ``[d_out]``, or ``None``."""
        bias = getattr(self.module, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None


@dataclass(frozen=True, eq=False)
class Block:
    """One transformer block and its linear maps, in the order of their registration."""

    index: int
    name: str
    module: nn.Module
    linears: tuple[LinearMap, ...]


def find_blocks(model: nn.Module) -> tuple[Block, ...]:
    """Return the decoder blocks of ``model``: the largest ``ModuleList`` of one class with linear maps.

    Raises:
        UnsupportedModelError: If there is none, or the blocks hold a kind of layer that peelwise cannot
            audit yet (mixture of experts, convolutions, recurrence); the message names what was found.
    """
    candidates = list(_candidate_lists(model))
    if not candidates:
        raise UnsupportedModelError(_what_was_found(model))
    name, modules = max(candidates, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    _refuse_encoder_decoder(model, candidates)
    name = plain_name(name)
    blocks = tuple(
        Block(index, f"{name}.{index}", module, tuple(_linear_maps(unwrapped(module), f"{name}.{index}")))
        for index, module in enumerate(modules)
    )
    for block in blocks:
        _refuse_unknown_parts(block)
    return blocks


def find_head(model: nn.Module, blocks: tuple[Block, ...]) -> nn.Module | None:
    """Return the output head: what transformers calls it, or the last linear map outside the blocks."""
    getter = getattr(model, "get_output_embeddings", None)
    if callable(getter):
        head = getter()
        return head if isinstance(head, nn.Linear) else None
    inside = {id(m) for block in blocks for m in block.module.modules()}
    outside = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in inside]
    return outside[-1] if outside else None


def vocabulary_size(model: nn.Module) -> int | None:
    """Return how many token ids the input embedding knows, or ``None`` if it cannot be told."""
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    if embedding is None:
        embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    size = getattr(embedding, "num_embeddings", None)
    return int(size) if size is not None else None


def context_length(model: nn.Module) -> int | None:
    """Return how many positions a model of transformers is made for, or ``None`` if it does not say."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``'s wrapper, or the model itself."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def plain_name(name: str) -> str:
    """Return the name of a module or tensor without the part that ``torch.compile``'s wrapper adds."""
    return name.replace("_orig_mod.", "")


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear map that can be audited: ``nn.Linear``, transformers' Conv1D, or a low-bit one."""
    return isinstance(module, nn.Linear) or _is_transposed(module) or is_low_bit(module)


def _is_transposed(module: nn.Module) -> bool:
    # By name, so that transformers need not be imported to audit a model that does not use it.
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _linear_maps(module: nn.Module, prefix: str) -> Iterator[LinearMap]:
    for name, child in module.named_modules():
        if is_linear(child):
            yield LinearMap(f"{prefix}.{plain_name(name)}", child, _is_transposed(child))


def _candidate_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield outermost ``ModuleList``s whose items are of one class and hold a linear map."""
    taken: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in taken):
            continue
        if isinstance(module, nn.ModuleList) and len(module) and len({type(unwrapped(m)) for m in module}) == 1:
            taken.append(name)
            if any(is_linear(m) for m in module.modules()):
                yield name, module


def _refuse_encoder_decoder(model: nn.Module, candidates: list[tuple[str, nn.ModuleList]]) -> None:
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        names = ", ".join(name for name, _ in candidates)
        raise UnsupportedModelError(
            f"Not yet: {type(model).__name__} is an encoder-decoder (blocks found: {names}). "
            "peelwise audits decoder-only language models."
        )


def _refuse_unknown_parts(block: Block) -> None:
    for name, module in unwrapped(block.module).named_modules():
        kind, where = type(module).__name__, f"{block.name}.{name}".rstrip(".")
        if isinstance(module, _CONVOLUTIONS):  # first: their weights have three dimensions too
            raise UnsupportedModelError(f"Not yet: convolutional blocks, found {kind} at {where}.")
        experts = "expert" in kind.lower() or "moe" in kind.lower() or "router" in kind.lower()
        if experts or any(p.dim() == 3 for p in module.parameters(recurse=False)):
            raise UnsupportedModelError(f"Not yet: mixture of experts, found {kind} at {where}.")
        if isinstance(module, _RECURRENT):
            raise UnsupportedModelError(f"Not yet: recurrent blocks, found {kind} at {where}.")
    if not block.linears:
        raise UnsupportedModelError(
            f"{block.name} ({type(block.module).__name__}) holds no nn.Linear or Conv1D, which is what is audited."
        )


def _what_was_found(model: nn.Module) -> str:
    kinds = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
    found = ", ".join(kinds[:8]) or "nothing"
    special = [m for m in model.modules() if isinstance(m, _CONVOLUTIONS + _RECURRENT)]
    prefix = f"Not yet: {type(special[0]).__name__} layers. " if special else ""
    return (
        f"{prefix}No blocks found in {type(model).__name__}: looked for an nn.ModuleList of blocks of one "
        f"class that hold nn.Linear or transformers' Conv1D; the model is made of {found}."
    )


def parameter_count(model: nn.Module) -> int:
    """Return the number of distinct parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter."""
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")
