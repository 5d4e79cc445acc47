"""Decoder-only transformers: the list of blocks, the head, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from peelwise.errors import UnsupportedModelError
from peelwise.model.layers import Block, is_linear, linear_layers, named_embedding, plain_name, unwrapped

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


_RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


def find_blocks(model: nn.Module) -> tuple[Block, ...]:
    """Return the decoder blocks of ``model``: the largest ``ModuleList`` of one class with linear layers.

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
        Block(index, f"{name}.{index}", module, tuple(linear_layers(unwrapped(module), f"{name}.{index}")))
        for index, module in enumerate(modules)
    )
    for block in blocks:
        _refuse_unknown_parts(block)
    return blocks


def find_head(model: nn.Module, blocks: tuple[Block, ...]) -> nn.Module | None:
    """Return the output head: what transformers calls it, or the last linear layer outside the blocks."""
    if callable(getattr(model, "get_output_embeddings", None)):
        head = named_embedding(model, "output")
        return head if isinstance(head, nn.Linear) else None
    inside = {id(m) for block in blocks for m in block.module.modules()}
    outside = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in inside]
    return outside[-1] if outside else None


def _candidate_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield outermost ``ModuleList``s whose items are of one class and hold a linear layer."""
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
        if _holds_experts(module, kind):
            raise UnsupportedModelError(f"Not yet: mixture of experts, found {kind} at {where}.")
        if any(sum(size > 1 for size in p.shape) > 2 for p in module.parameters(recurse=False)):
            raise UnsupportedModelError(
                f"Not yet: mixture of experts, or attention weights kept per head, found parameters of three "
                f"dimensions in {kind} at {where}."
            )
        if isinstance(module, _RECURRENT):
            raise UnsupportedModelError(f"Not yet: recurrent blocks, found {kind} at {where}.")
    if not block.linears:
        raise UnsupportedModelError(
            f"{block.name} ({type(block.module).__name__}) holds no nn.Linear or Conv1D, which is what is audited."
        )


def _holds_experts(module: nn.Module, kind: str) -> bool:
    """Whether a module is a mixture, by its class's name *and* what it holds: dense ones are called so too."""
    if not any(True for _ in module.parameters()):
        return False
    parts = {name.lower() for name, _ in module.named_children()}
    named = any(word in kind.lower() for word in ("experts", "router"))
    return named or ("moe" in kind.lower() and any("expert" in part or "router" in part for part in parts))


def _what_was_found(model: nn.Module) -> str:
    kinds = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
    found = ", ".join(kinds[:8]) or "nothing"
    special = [m for m in model.modules() if isinstance(m, _CONVOLUTIONS + _RECURRENT)]
    prefix = f"Not yet: {type(special[0]).__name__} layers. " if special else ""
    return (
        f"{prefix}No blocks found in {type(model).__name__}: looked for an nn.ModuleList of blocks of one "
        f"class that hold nn.Linear or transformers' Conv1D; the model is made of {found}."
    )
