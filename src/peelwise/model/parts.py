"""The parts of a block: its branches, norms and linear layers, by names that are the same in all blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from peelwise.model.layers import Block, LinearLayer, is_linear, unwrapped

ATTENTION, CROSS_ATTENTION, MLP = "attention", "cross-attention", "mlp"
_CROSS = "cross"
_ATTENTION_WORDS = ("attn", "attention")
_MLP_WORDS = ("mlp", "ffn", "feed_forward", "feedforward", "layerff")


@dataclass(frozen=True, eq=False)
class Branch:
    """One path that adds to the stream: attention, or the MLP.

    Attributes:
        name: ``attention``, ``mlp``, or the name of the module where it is neither.
        module: the module whose output is added; the last linear layer where the block itself holds the layers.
        linears: the linear layers on this path, in the order of their registration.
    """

    name: str
    module: nn.Module
    linears: tuple[LinearLayer, ...]

    @property
    def writer(self) -> LinearLayer:
        """The linear layer that comes last, whose output is the branch's."""
        return self.linears[-1]


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of one block.

    Attributes:
        block: the block.
        branches: its paths, in order.
        norms: normalisations with a gain, by their name within the block.
        linears: linear layers by their name within the block.
        head_dim: width of an attention head, or ``None`` where the model does not say.
    """

    block: Block
    branches: tuple[Branch, ...]
    norms: dict[str, nn.Module]
    linears: dict[str, LinearLayer]
    head_dim: int | None


def parts_of(block: Block) -> Parts:
    """Return the parts of a block; names are those within it, so that they can be compared over depth."""
    module = unwrapped(block.module)
    # Also those that an audit leaves as they are: a part is what the model computes with.
    order = {id(child): place for place, child in enumerate(module.modules())}
    # Experts are not parts: which of them does what is not the same in all blocks.
    single = [linear for linear in (*block.linears, *block.frozen) if not linear.is_expert]
    everything = sorted(single, key=lambda linear: order[id(linear.module)])
    linears = {linear.name.removeprefix(f"{block.name}."): linear for linear in everything}
    norms = {name: child for name, child in module.named_modules() if _is_norm(child)}
    return Parts(block, _branches(module, linears), norms, linears, _head_dim(module))


def gain_of(norm: nn.Module) -> Tensor:
    """Return the gain ``[d]`` of a normalisation."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _branches(module: nn.Module, linears: dict[str, LinearLayer]) -> tuple[Branch, ...]:
    found: list[Branch] = []
    own: list[LinearLayer] = []  # layers that the block holds itself, as OPT does with those of its MLP
    for name, title, child in _children(module):
        inside = tuple(linear for key, linear in linears.items() if key == name or key.startswith(f"{name}."))
        if not inside:
            continue
        if is_linear(child):
            own.extend(inside)
        else:
            taken = {branch.name for branch in found}
            # A norm behind the MLP may have layers of its own and be called after it: one name, one branch.
            own_name = next(each for each in (_branch_name(title), title, name) if each not in taken)
            found.append(Branch(own_name, child, inside))
    if own:
        taken = {branch.name for branch in found}
        found.append(Branch(MLP if MLP not in taken else "layers", own[-1].module, tuple(own)))
    return tuple(found)


def _children(module: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield name and title of every child; of a list its members instead, which only their classes tell apart (T5)."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{place}", type(each).__name__, each) for place, each in enumerate(child))
        else:
            yield name, name, child


def _branch_name(name: str) -> str:
    lowered = name.lower()
    if _CROSS in lowered and any(word in lowered for word in _ATTENTION_WORDS):
        return CROSS_ATTENTION
    if any(word in lowered for word in _ATTENTION_WORDS):
        return ATTENTION
    return MLP if any(word in lowered for word in _MLP_WORDS) else name


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1


def _head_dim(module: nn.Module) -> int | None:
    for child in module.modules():
        size = getattr(child, "head_dim", None)
        if isinstance(size, int) and size > 0:
            return size
    return None
