"""The weights of two models side by side: by part, by name, as they are computed with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peelwise.errors import ModelError
from peelwise.model.fingerprint import is_plain
from peelwise.model.layers import Block, is_linear, linear_modules, plain_name, unwrapped
from peelwise.model.runner import Runner
from peelwise.stats.linalg import solve_dtype
from peelwise.tasks.compare.kinds import Kind, joint_kind, kind_of

_LINEAR_ENOUGH = 1e-3  # relative: f(2x) - f(0) = 2 (f(x) - f(0)) within float32


def _wide(x: Tensor) -> Tensor:
    return x.to(solve_dtype(x.device))  # squares of large weights overflow in float32


def _norm(x: Tensor) -> float:
    return float(_wide(x).norm())


@dataclass(frozen=True, eq=False)
class Twin:
    """One tensor of both models: as it is computed with, ``[d_out, d_in]`` or ``[n]``."""

    name: str
    old: Tensor
    new: Tensor

    @property
    def relative(self) -> float:
        """``|NEW - OLD| / |OLD|``; 1 of a tensor that was all zero and is not now."""
        own, distance = _norm(self.old), _norm(_wide(self.new) - _wide(self.old))
        return distance / own if own else float(distance > 0)


@dataclass(frozen=True, eq=False)
class Twins:
    """All tensors of a part, and what became of each."""

    tensors: tuple[Twin, ...]
    kinds: dict[str, Kind]

    @property
    def same(self) -> bool:
        """Whether no number differs."""
        return all(kind.code == "unchanged" for kind in self.kinds.values())

    @property
    def relative(self) -> float:
        """``|NEW - OLD| / |OLD|`` over all tensors."""
        own = math.hypot(*(_norm(t.old) for t in self.tensors))
        distance = math.hypot(*(_norm(_wide(t.new) - _wide(t.old)) for t in self.tensors))
        return distance / own if own else float(distance > 0)

    @property
    def kind(self) -> Kind:
        """What is true of most of the change."""
        return joint_kind(self.kinds, {t.name: t.old.numel() * min(t.relative, 1.0) for t in self.tensors})


def block_twins(old: tuple[Block, ...], new: tuple[Block, ...]) -> tuple[Twins, ...]:
    """Return the tensors of all blocks, beside each other.

    Raises:
        ModelError: If the models have other blocks, layers or shapes.
    """
    if len(old) != len(new):
        raise ModelError(
            f"OLD has {len(old)} blocks, NEW has {len(new)}: expected two models of one architecture. Give a model and "
            "what was made from it."
        )
    before = [_matching(one, other) for one, other in zip(old, new, strict=True)]
    after = [_matching(other, one) for one, other in zip(old, new, strict=True)]
    return tuple(_twins(b.name, before[b.index], after[b.index], before) for b in new)


def end_twins(old: Runner, new: Runner) -> dict[str, Twins]:
    """Return the tensors of embedding, norm (all else) and head.

    Raises:
        ModelError: If one model has tensors that the other lacks, or of other shapes.
    """
    before, after = _matching_ends(old, new), _matching_ends(new, old)
    return {unit: _twins(unit, before[unit], after[unit], []) for unit in ("embedding", "norm", "head")}


def _twins(where: str, old: dict[str, Tensor], new: dict[str, Tensor], blocks: list[dict[str, Tensor]]) -> Twins:
    lacking = sorted(old.keys() ^ new.keys())
    if lacking:
        which = "NEW" if lacking[0] in old else "OLD"
        raise ModelError(
            f"{which} has no {lacking[0]} in {where}: expected two models of one architecture. Give a model and what "
            "was made from it."
        )
    tensors, kinds = [], {}
    for name, tensor in old.items():
        if tensor.shape != new[name].shape:
            raise ModelError(
                f"{where}: {name} is {tuple(tensor.shape)} in OLD and {tuple(new[name].shape)} in NEW. Compare models "
                "of one shape and vocabulary."
            )
        tensors.append(Twin(name, tensor, new[name].to(tensor.device)))
        elsewhere = {i: b[name] for i, b in enumerate(blocks) if b is not old and name in b}
        kinds[name] = kind_of(tensor, tensors[-1].new, elsewhere)
    return Twins(tuple(tensors), kinds)


def _effective(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a block by its name in it; of linear layers what they compute with."""
    module = unwrapped(module)
    inside: set[str] = set()
    for layer in linear_modules(module, ""):  # experts as the parameters that hold them
        name = layer.name.lstrip(".")
        inside.add(name)
        yield f"{name}.weight", layer.weight()
        bias = layer.bias()
        if bias is not None:
            yield f"{name}.bias", bias
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name.rpartition(".")[0] not in inside:
            yield plain_name(name), parameter.detach()


def _matching(block: Block, other: Block) -> dict[str, Tensor]:
    """Return the tensors of a block, those of wrapped layers under the names that the other model has.

    Where one model has a linear layer and the other a module that wraps one (a LoRA that is not merged), the weight is
    what the wrapper computes.
    """
    own = dict(_effective(block.module))
    modules = dict(unwrapped(block.module).named_modules())
    for path, layer in unwrapped(other.module).named_modules():
        wrapper = modules.get(path)
        if wrapper is None or not is_linear(layer) or is_linear(wrapper):
            continue
        found = _computed(wrapper, layer)
        if found is not None:
            own = {name: tensor for name, tensor in own.items() if not name.startswith(f"{path}.")}
            own |= {f"{path}.{name}": tensor for name, tensor in found.items()}
    return own


@torch.no_grad()
def _computed(module: nn.Module, layer: nn.Module) -> dict[str, Tensor] | None:
    """Return ``weight [d_out, d_in]`` and ``bias [d_out]``, if ``layer`` has one, of a module that computes like it.

    ``None`` if it does not compute ``x W^T + b``.
    """
    (plain,) = (each for each in linear_modules(layer, "") if each.module is layer)
    d_out, d_in = plain.weight().shape
    parameter = next(module.parameters(), plain.weight())
    x = torch.eye(d_in, dtype=parameter.dtype, device=parameter.device)
    try:
        nothing, once, twice = (module(each[None])[0] for each in (torch.zeros_like(x[:1]), x, 2 * x))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None
    W = once - nothing  # [d_in, d_out]
    slack = _LINEAR_ENOUGH * float(W.abs().max())
    if W.shape != (d_in, d_out) or not torch.allclose(twice - nothing, 2 * W, rtol=_LINEAR_ENOUGH, atol=slack):
        return None
    return {"weight": W.T} | ({"bias": nothing[0]} if plain.has_bias else {})


def _matching_ends(runner: Runner, other: Runner) -> dict[str, dict[str, Tensor]]:
    """Return the tensors outside of the blocks as numbers, by the names that they have in the other model.

    PEFT, for one, wraps the whole model, and all its names begin with that.
    """
    own, theirs = runner.blocks[0].name, other.blocks[0].name
    wrapper = own.removesuffix(theirs) if own.endswith(f".{theirs}") else ""
    return {
        unit: {name.removeprefix(wrapper): _decoded(tensor) for name, tensor in held.items()}
        for unit, held in end_tensors(runner).items()
    }


def _decoded(tensor: Tensor) -> Tensor:
    """Return the numbers that a quantised tensor stands for, and any other as it is."""
    return tensor if is_plain(tensor) else tensor.dequantize()


def end_tensors(runner: Runner) -> dict[str, dict[str, Tensor]]:
    """Return the tensors outside of the blocks; a tied head counts as embedding and as head.

    What is beside the blocks and holds a matrix belongs to the embedding if it was put into the model before them, else
    to what comes behind them; norms by themselves do anyhow. Where the head cannot be told apart, all of that is head.
    """
    found: dict[str, dict[str, Tensor]] = {"embedding": {}, "norm": {}, "head": {}}
    behind = "norm" if runner.head is not None else "head"
    for path, module, before in _beside_the_blocks(runner):
        own = list(module.named_modules(prefix=path, remove_duplicate=False))
        matrices = any(p.dim() > 1 for _, m in own if m is not runner.head for p in m.parameters(recurse=False))
        for place, part in own:
            unit = "head" if part is runner.head else "embedding" if matrices and before else behind
            for name, parameter in part.named_parameters(recurse=False):
                found[unit][plain_name(f"{place}.{name}".lstrip("."))] = parameter.detach()
    return found


def _beside_the_blocks(runner: Runner) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield path and module of all that holds no block, and whether it was put into the model before the blocks."""
    blocks = {id(block.module) for block in runner.blocks}
    before = True

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
        nonlocal before
        if id(module) in blocks:
            before = False
        elif not any(id(each) in blocks for each in module.modules()):
            yield path, module, before
        else:
            yield path, _Own(module), True
            for name, child in module.named_children():
                yield from walk(f"{path}.{name}".lstrip("."), child)

    yield from walk("", runner.model)


class _Own(nn.Module):
    """The parameters that a module holds itself, as one without children."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
