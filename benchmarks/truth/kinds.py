"""Kinds of damage to one block of a large model, done in place and undone: the truth that a check must find.

Every kind is a function of (model, blocks, index, random generator) that changes tensors under `kept`, or hangs hooks
on modules. Half of the kinds (`DEVELOPMENT`) may be looked at while a rule is made; the figures of the other half
(`HELD_BACK`) are reported as they come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peelwise.model.layers import Block

Damage = Callable[["Surgery"], None]


class Surgery:
    """What a kind of damage works with: one block, its neighbours, and a way back for all it touches."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], index: int, seed: int, stack: ExitStack) -> None:
        self.model, self.blocks, self.index = model, blocks, index
        self.random = torch.Generator().manual_seed(seed)
        self._stack = stack

    def layer(self, part: str, index: int | None = None) -> nn.Linear:
        """Return a linear layer of the block by the end of its name."""
        block = self.blocks[self.index if index is None else index]
        found = [linear.module for linear in block.linears if linear.name.endswith(part)]
        (layer,) = found
        assert isinstance(layer, nn.Linear)
        return layer

    def layers(self, index: int | None = None) -> list[nn.Linear]:
        """Return all linear layers of the block."""
        block = self.blocks[self.index if index is None else index]
        return [linear.module for linear in block.linears if isinstance(linear.module, nn.Linear)]

    def norms(self, index: int | None = None) -> list[nn.Module]:
        """Return the normalisations of the block."""
        module = self.blocks[self.index if index is None else index].module
        return [m for m in module.modules() if "norm" in type(m).__name__.lower()]

    def set(self, parameter: Any, value: Tensor) -> None:
        """Write a value into a parameter; the old one comes back at the end."""
        before, value = parameter.detach().clone(), value.detach().clone()  # it may be a view of the parameter

        def back() -> None:
            with torch.no_grad():
                parameter.copy_(before)

        self._stack.callback(back)
        with torch.no_grad():
            parameter.copy_(value)

    def put(self, of: Any, name: str, value: Any) -> None:
        """Set an attribute; the old one comes back at the end."""
        before = getattr(of, name)
        self._stack.callback(lambda: setattr(of, name, before))
        setattr(of, name, value)

    def hook(self, handle: Any) -> None:
        """Keep a hook until the end."""
        self._stack.callback(handle.remove)

    def noise_like(self, W: Tensor) -> Tensor:
        """Return normal noise with the standard deviation of a weight."""
        return torch.randn(W.shape, generator=self.random) * W.std()

    def permutation(self, n: int) -> Tensor:
        """Return a random permutation."""
        return torch.randperm(n, generator=self.random)

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return int(self.model.config.head_dim)


@contextmanager
def damaged(
    model: nn.Module, blocks: Sequence[Block], kind: str, index: int, seed: int = 0, *, damage: Damage | None = None
) -> Iterator[None]:
    """Run with one block damaged, or with ``damage`` of one's own; afterwards the model is what it was, to the bit."""
    with ExitStack() as stack:
        (damage or KINDS[kind])(Surgery(model, blocks, index, seed, stack))
        yield


# -- weights: size, sign, noise -------------------------------------------------------------------------


def _noise(share: float, *parts: str) -> Damage:
    def damage(s: Surgery) -> None:
        for layer in [s.layer(part) for part in parts] or s.layers():
            s.set(layer.weight, layer.weight + share * s.noise_like(layer.weight))

    return damage


def _scaled(factor: float, *parts: str) -> Damage:
    def damage(s: Surgery) -> None:
        for layer in [s.layer(part) for part in parts] or s.layers():
            s.set(layer.weight, factor * layer.weight)

    return damage


def _redrawn(*parts: str, size: float = 1.0) -> Damage:
    def damage(s: Surgery) -> None:
        for part in parts:
            W = s.layer(part).weight
            s.set(W, size * s.noise_like(W))

    return damage


def _pruned(share: float, *parts: str) -> Damage:
    def damage(s: Surgery) -> None:
        for part in parts:
            W = s.layer(part).weight
            s.set(W, W * (W.abs() > W.abs().flatten().kthvalue(int(share * W.numel()))[0]))

    return damage


def _rounded(bits: int) -> Damage:
    """Round every row symmetrically to so many bits."""

    def damage(s: Surgery) -> None:
        most = 2 ** (bits - 1) - 1
        for layer in s.layers():
            scale = layer.weight.abs().amax(dim=1, keepdim=True) / most
            s.set(layer.weight, (layer.weight / scale).round().clamp(-most, most) * scale)

    return damage


def _low_rank(share: float) -> Damage:
    def damage(s: Surgery) -> None:
        for layer in s.layers():
            U, S, V = torch.linalg.svd(layer.weight, full_matrices=False)
            k = max(1, int(share * len(S)))
            s.set(layer.weight, (U[:, :k] * S[:k]) @ V[:k])

    return damage


# -- order: rows, channels, heads, blocks ----------------------------------------------------------------


def _permuted_neurons(s: Surgery) -> None:
    up, gate = s.layer("up_proj").weight, s.layer("gate_proj").weight
    order = s.permutation(len(up))
    s.set(up, up[order])
    s.set(gate, gate[order])


def _shuffled_rows(part: str) -> Damage:
    def damage(s: Surgery) -> None:
        W = s.layer(part).weight
        s.set(W, W[s.permutation(len(W))])

    return damage


def _transposed(part: str) -> Damage:
    def damage(s: Surgery) -> None:
        W = s.layer(part).weight
        s.set(W, W.T)

    return damage


def _copied(s: Surgery) -> None:
    other = s.index - 3 if s.index >= 3 else s.index + 3
    for mine, theirs in zip(s.layers(), s.layers(other), strict=True):
        s.set(mine.weight, theirs.weight)


def _swapped(s: Surgery) -> None:
    other = s.index + 1 if s.index + 1 < len(s.blocks) else s.index - 1
    mine, theirs = s.blocks[s.index].module, s.blocks[other].module
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        first, second = a.detach().clone(), b.detach().clone()
        s.set(a, second)
        s.set(b, first)


def _interleaved(part: str) -> Damage:
    """Put a head's rows into the interleaved rotary layout (pairs beside each other instead of by halves)."""

    def damage(s: Surgery) -> None:
        W = s.layer(part).weight
        d = s.head_dim
        s.set(W, W.unflatten(0, (-1, 2, d // 2)).transpose(1, 2).reshape(W.shape))

    return damage


def _both(*damages: Damage) -> Damage:
    def damage(s: Surgery) -> None:
        for each in damages:
            each(s)

    return damage


def _heads_zeroed(count: int) -> Damage:
    def damage(s: Surgery) -> None:
        W = s.layer("o_proj").weight
        heads = W.shape[1] // s.head_dim
        value = W.detach().clone().unflatten(1, (heads, s.head_dim))
        value[:, s.permutation(heads)[:count]] = 0
        s.set(W, value.flatten(1))

    return damage


def _head_doubled(s: Surgery) -> None:
    """Let one head of queries take the place of another one of a different group."""
    W = s.layer("q_proj").weight
    value = W.detach().clone().unflatten(0, (-1, s.head_dim))
    value[-1] = value[0]
    s.set(W, value.flatten(0, 1))


def _heads_shifted(s: Surgery) -> None:
    """Give every head of queries the place of the next one."""
    W = s.layer("q_proj").weight
    s.set(W, W.detach().unflatten(0, (-1, s.head_dim)).roll(1, 0).flatten(0, 1))


# -- norms ------------------------------------------------------------------------------------------------


def _gains_permuted(s: Surgery) -> None:
    for norm in s.norms():
        s.set(norm.weight, norm.weight[s.permutation(len(norm.weight))])


def _gains_of_neighbour(s: Surgery) -> None:
    other = s.index - 1 if s.index else s.index + 1
    for mine, theirs in zip(s.norms(), s.norms(other), strict=True):
        s.set(mine.weight, theirs.weight)


def _gains_one(s: Surgery) -> None:
    for norm in s.norms():
        s.set(norm.weight, torch.full_like(norm.weight, float(norm.weight.mean())))


def _epsilon(s: Surgery) -> None:
    for norm in s.norms():
        s.put(norm, "variance_epsilon", 1.0)


# -- code and configuration of one block -------------------------------------------------------------------


def _temperature(factor: float) -> Damage:
    return _scaled(factor, "q_proj")


def _rotary_base(factor: float) -> Damage:
    """Let one block turn by angles of another base."""

    def damage(s: Surgery) -> None:
        base = float(getattr(s.model.config, "rope_theta", None) or s.model.config.rope_parameters["rope_theta"])
        d = s.head_dim

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            cos, sin = kwargs["position_embeddings"]
            positions = torch.arange(cos.shape[1], dtype=torch.float32)
            frequencies = (base * factor) ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
            angles = torch.outer(positions, frequencies).repeat(1, 2)[None].expand(cos.shape)
            return args, kwargs | {"position_embeddings": (angles.cos().to(cos), angles.sin().to(sin))}

        s.hook(s.blocks[s.index].module.register_forward_pre_hook(before, with_kwargs=True))

    return damage


def _coarse_activations(s: Surgery) -> None:
    """Round the inputs of the block's layers to four bits per tensor, the way a bad calibration would."""
    for layer in s.layers():

        def before(module: nn.Module, args: Any) -> Any:
            x = args[0]
            scale = x.detach().abs().max() / 7
            return (x + ((x / scale).round() * scale - x).detach(),)

        s.hook(layer.register_forward_pre_hook(before))


def _outlier(s: Surgery) -> None:
    W = s.layer("down_proj").weight
    value = W.detach().clone()
    value[0, 0] += 300 * W.std()
    s.set(W, value)


def _dropped_attention(s: Surgery) -> None:
    s.set(s.layer("o_proj").weight, torch.zeros_like(s.layer("o_proj").weight))


def _overshot(s: Surgery) -> None:
    """Move all weights along random rank-one directions, as one step of much too large a rate would."""
    for layer in s.layers():
        W = layer.weight
        u = torch.randn(W.shape[0], 1, generator=s.random)
        v = torch.randn(1, W.shape[1], generator=s.random)
        s.set(W, W + 1.0 * W.norm() * (u / u.norm()) @ (v / v.norm()))


DEVELOPMENT: dict[str, Damage] = {
    "noise 0.3 in all": _noise(0.3),
    "noise 1 in down": _noise(1.0, "down_proj"),
    "sign of down": _scaled(-1.0, "down_proj"),
    "all times 1.3": _scaled(1.3),
    "MLP re-drawn": _redrawn("gate_proj", "up_proj", "down_proj"),
    "MLP re-drawn small": _redrawn("gate_proj", "up_proj", "down_proj", size=0.05),
    "neurons permuted": _permuted_neurons,
    "low rank 1/4": _low_rank(0.25),
    "temperature 1/3": _temperature(3.0),
    "rotary layout of q": _interleaved("q_proj"),
    "4 heads zeroed": _heads_zeroed(4),
    "gains permuted": _gains_permuted,
    "2 bits": _rounded(2),
    "copy of a block": _copied,
    "rank one overshoot": _overshot,
    "rotary base times 100": _rotary_base(100.0),
}
HELD_BACK: dict[str, Damage] = {
    "noise 0.5 in attention": _both(*(_noise(0.5, part) for part in ("q_proj", "k_proj", "v_proj", "o_proj"))),
    "sign of o": _scaled(-1.0, "o_proj"),
    "sign of v": _scaled(-1.0, "v_proj"),
    "MLP times 0.5": _scaled(0.5, "down_proj"),
    "attention re-drawn": _redrawn("q_proj", "k_proj", "v_proj", "o_proj"),
    "rows of down shuffled": _shuffled_rows("down_proj"),
    "rows of k shuffled": _shuffled_rows("k_proj"),
    "low rank 1/8": _low_rank(0.125),
    "low rank 1/2": _low_rank(0.5),
    "swapped with the next": _swapped,
    "temperature 3": _temperature(1 / 3),
    "rotary layout of q and k": _both(_interleaved("q_proj"), _interleaved("k_proj")),
    "heads shifted": _heads_shifted,
    "head doubled": _head_doubled,
    "gains of a neighbour": _gains_of_neighbour,
    "gains all equal": _gains_one,
    "epsilon 1": _epsilon,
    "3 bits": _rounded(3),
    "70 % pruned": _both(_pruned(0.7, "gate_proj", "up_proj", "down_proj"), _pruned(0.7, "q_proj", "o_proj")),
    "o transposed": _transposed("o_proj"),
    "activations to 4 bits": _coarse_activations,
    "one outlier": _outlier,
    "attention dropped": _dropped_attention,
    "rotary base over 10": _rotary_base(0.1),
}
KINDS = DEVELOPMENT | HELD_BACK
