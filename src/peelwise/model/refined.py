"""Which linear layers of the blocks are asked about: all of them, those that training can change, or adapters."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from peelwise.errors import OptionError
from peelwise.model.layers import Block, LinearLayer, unwrapped
from peelwise.records.base import Note, note
from peelwise.records.options import Refine

_ADAPTERS = ("lora", "adapter")  # how a part of an adapter's name begins


def stepped_by(optimizer: torch.optim.Optimizer | None) -> frozenset[int] | None:
    """Return the identities of the parameters that an optimiser steps; ``None`` where there is none."""
    if optimizer is None:
        return None
    return frozenset(id(p) for group in optimizer.param_groups for p in group["params"])


def chosen(blocks: Sequence[Block], refine: Refine, stepped: Collection[int] | None = None) -> tuple[Block, ...]:
    """Return the blocks with the layers that are asked about; those that are not are in ``Block.frozen``.

    Args:
        blocks: as they were found.
        refine: ``"trainable"``: layers whose weights training can change (``requires_grad``; see ``stepped``);
            where there are none, as in a model that is merely open, all. ``"adapters"``: those that an adapter (LoRA
            and the like) adds.
        stepped: what the optimiser has (`stepped_by`); it decides where it has fewer than half of the layers that ask
            for gradients, and not none of them.

    Raises:
        OptionError: If there are no adapters and they are asked for.
    """
    if refine == "all":
        return tuple(blocks)
    adapters = {linear for block in blocks for linear in _adapters(block)}
    if refine == "adapters":
        if not adapters:
            raise OptionError(
                "refine='adapters': expected LoRA or other adapters in the blocks, got none. Try 'trainable' or 'all'."
            )
        return only(blocks, {linear.name for linear in adapters})
    linears = [linear for block in blocks for linear in block.linears]
    stepped = _told(linears, stepped)
    if not any(_in_training(linear, stepped) for linear in linears):
        return tuple(blocks)
    # Codes cannot ask for gradients. Beside adapters they are a frozen base, otherwise they are what the model is.
    trained = (m for m in linears if _in_training(m, stepped) or (_only_codes(m) and not adapters))
    return only(blocks, {linear.name for linear in trained})


def only(blocks: Sequence[Block], names: Collection[str]) -> tuple[Block, ...]:
    """Return the blocks with the layers of these names, and the others as frozen."""

    def split(block: Block) -> Block:
        every = (*block.linears, *block.frozen)
        asked = tuple(linear for linear in every if linear.name in names)
        return replace(block, linears=asked, frozen=tuple(linear for linear in every if linear.name not in names))

    return tuple(split(block) for block in blocks)


def names_of(blocks: Sequence[Block]) -> frozenset[str]:
    """Return the names of the layers that are asked about."""
    return frozenset(linear.name for block in blocks for linear in block.linears)


def in_training(blocks: Sequence[Block], stepped: Collection[int] | None = None) -> frozenset[str]:
    """Return the names of the layers, asked about or not, whose weights training can change; see `chosen`."""
    every = [linear for block in blocks for linear in (*block.linears, *block.frozen)]
    stepped = _told(every, stepped)
    return frozenset(linear.name for linear in every if _in_training(linear, stepped))


def frozen_note(blocks: Sequence[Block]) -> Iterator[Note]:
    """Yield a note on layers that are left as they are, with their share of the numbers in the blocks."""
    layers = [linear for block in blocks for linear in block.frozen]
    if layers:
        inside = {id(p): p.numel() for linear in layers for p in linear.module.parameters()}
        total = {id(p): p.numel() for block in blocks for p in block.module.parameters()}
        share = sum(inside.values()) / max(sum(total.values()), 1)
        without = sum(not block.linears for block in blocks)
        yield note("frozen-layers", layers=len(layers), share=share, blocks=without)


def _told(linears: Sequence[LinearLayer], stepped: Collection[int] | None) -> Collection[int] | None:
    """Return what an optimiser has where that tells what is meant to train, else ``None``.

    Fewer than half of the layers that ask for gradients are a choice (adapters, the upper blocks). Where some are
    missing from it that is more likely a mistake, which is worth seeing; where all are, it steps copies of them.
    """
    asking = sum(_in_training(linear, None) for linear in linears)
    taken = sum(_in_training(linear, stepped) for linear in linears)
    return stepped if 0 < taken < asking / 2 else None


def _in_training(linear: LinearLayer, stepped: Collection[int] | None) -> bool:
    """Whether a step can change the layer's weight, also where that is made of others (a parametrisation)."""
    return any(
        p.requires_grad and (stepped is None or id(p) in stepped)
        for name, p in linear.module.named_parameters()
        if name != "bias"
    )


def _only_codes(linear: LinearLayer) -> bool:
    """Whether a low-bit layer has no floating-point weight behind its codes."""
    weight = linear.module._parameters.get("weight")
    return linear.low_bit and not (
        type(weight) is nn.Parameter and weight.is_floating_point() and weight.element_size() >= 2
    )


def is_adapted(linear: LinearLayer) -> bool:
    """Whether an adapter of PEFT wraps the layer, which is its base."""
    return "base_layer" in linear.name.split(".")


def adapter_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that adapters added: by their name, or beside the ``base_layer`` of PEFT."""
    wrappers = tuple(f"{name}." for name, module in model.named_modules() if "base_layer" in module._modules)
    return frozenset(name for name, _ in model.named_parameters() if _is_added(name, wrappers))


def _adapters(block: Block) -> Iterator[LinearLayer]:
    """Yield the layers that an adapter added."""
    modules = unwrapped(block.module).named_modules()
    wrappers = tuple(f"{name}." for name, module in modules if "base_layer" in module._modules)
    for linear in block.linears:
        if _is_added(linear.name.removeprefix(f"{block.name}."), wrappers):
            yield linear


def _is_added(name: str, wrappers: Sequence[str]) -> bool:
    beside = any(name.startswith(w) and not name.startswith(f"{w}base_layer") for w in wrappers)
    return beside or any(part.lower().startswith(_ADAPTERS) for part in name.split("."))
