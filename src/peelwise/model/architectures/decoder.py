"""Transformers: the list of blocks, of an encoder-decoder that of its decoder, the head, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from peelwise.errors import UnsupportedModelError
from peelwise.model.architectures.stacks import blocks_in, holds_linears, is_encoder_decoder
from peelwise.model.layers import Block, named_embedding

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


_RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


def find_blocks(model: nn.Module) -> tuple[Block, ...]:
    """Return the blocks of ``model``: the largest ``ModuleList`` with linear layers.

    Blocks may be of several classes, and hold convolutions, recurrences and parameters of other kinds beside their
    linear layers, which are left as they are; a block without any linear layer has no witness. Where a model of
    transformers says which part of it is the text decoder, blocks are looked for there; what an encoder makes is then
    an input of theirs, and text alone does not run such a model (`refuse_text`).

    Raises:
        UnsupportedModelError: If there is none; the message names what was found.
    """
    _refuse_virtual_tokens(model)
    candidates = _in_text_decoder(model, list(candidate_lists(model)))
    if not candidates:
        raise UnsupportedModelError(_what_was_found(model))
    return blocks_in(*max(candidates, key=lambda item: sum(p.numel() for p in item[1].parameters())))


def find_head(model: nn.Module, blocks: tuple[Block, ...]) -> nn.Module | None:
    """Return the output head: what transformers calls it, or the last linear layer outside the blocks."""
    if callable(getattr(model, "get_output_embeddings", None)):
        head = _trained_copy(named_embedding(model, "output"))
        return head if isinstance(head, nn.Linear) else None
    inside = {id(m) for block in blocks for m in block.module.modules()}
    outside = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in inside]
    return outside[-1] if outside else None


def candidate_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield outermost ``ModuleList``s that hold a linear layer and are no lists of lists."""
    taken: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in taken):
            continue
        if isinstance(module, nn.ModuleList) and len(module) and not any(isinstance(m, nn.ModuleList) for m in module):
            taken.append(name)
            if holds_linears(module):
                yield name, module


def _in_text_decoder(model: nn.Module, candidates: list[tuple[str, nn.ModuleList]]) -> list[tuple[str, nn.ModuleList]]:
    """Return the lists inside of what a model of transformers calls its decoder, or all if it calls nothing so."""
    getter = getattr(model, "get_decoder", None)
    try:
        decoder = getter() if callable(getter) and hasattr(model, "config") else None
    except (NotImplementedError, AttributeError):  # a class that has none
        decoder = None
    if not isinstance(decoder, nn.Module):
        return candidates
    inside = {id(module) for module in decoder.modules()}
    return [each for each in candidates if id(each[1]) in inside] or candidates


def refuse_text(model: nn.Module) -> None:
    """Refuse to measure an encoder-decoder on text alone.

    Raises:
        UnsupportedModelError: With the lists of blocks that it has.
    """
    if is_encoder_decoder(model):
        names = ", ".join(name for name, _ in candidate_lists(model))
        raise UnsupportedModelError(
            f"Not yet: {type(model).__name__} is an encoder-decoder (blocks found: {names}), which text alone does not "
            "run. peelwise check and audit take batches of its keyword arguments: Probe.from_batches."
        )


def _refuse_virtual_tokens(model: nn.Module) -> None:
    """Refuse PEFT's prompt, prefix and p-tuning: blocks see more positions than the text has."""
    configs = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        if getattr(config, "num_virtual_tokens", None):
            raise UnsupportedModelError(
                f"Not yet: {type(model).__name__} puts {config.num_virtual_tokens} virtual tokens in front of every "
                f"text ({type(config).__name__}), which are in no block. Measure the model below it: "
                "model.get_base_model()."
            )


def _trained_copy(head: nn.Module | None) -> nn.Module | None:
    """Return the copy that runs of a module which PEFT trains whole beside its adapters (``modules_to_save``)."""
    copies, active = getattr(head, "modules_to_save", None), getattr(head, "active_adapters", ())
    if isinstance(copies, nn.ModuleDict):
        return next((copies[name] for name in active if name in copies), head)
    return head


def _what_was_found(model: nn.Module) -> str:
    kinds = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
    found = ", ".join(kinds[:8]) or "nothing"
    special = [m for m in model.modules() if isinstance(m, _CONVOLUTIONS + _RECURRENT)]
    prefix = f"Not yet: {type(special[0]).__name__} layers. " if special else ""
    return (
        f"{prefix}No blocks found in {type(model).__name__}: looked for an nn.ModuleList of blocks that hold "
        f"nn.Linear, transformers' Conv1D or experts; the model is made of {found}."
    )
