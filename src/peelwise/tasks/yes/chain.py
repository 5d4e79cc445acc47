"""Reads a network that is one chain of affine maps and elementwise activations; no mathematics.

The network is traced, so a plain ``nn.Sequential``, nested ones, and a class whose ``forward`` calls
``functional.relu`` are all read the same way. Nothing of the network is changed, and no hook of it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from peelwise.errors import UnsupportedModelError

Activation = Callable[[Tensor], Tensor]
_DROPOUT = (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)
_PASSIVE_FUNCTIONS = (functional.dropout, functional.alpha_dropout, torch.dropout)
_MIXING = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU, nn.MultiheadAttention)


@dataclass(frozen=True, eq=False)
class AffineLayer:
    """``h -> activation(h W^T + b)``; ``activation`` is ``None`` where nothing follows the affine map."""

    name: str
    module: nn.Linear
    activation: Activation | None
    activation_name: str

    @property
    def has_bias(self) -> bool:
        """Whether the layer adds a bias."""
        return isinstance(self.module.bias, Tensor)

    def affine(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b`` in the dtype of ``x``, on its device, outside the graph of gradients.

        ``W`` is what the layer computes with: for layers that train inside a format, not the latent weight.
        """
        effective = getattr(self.module, "effective_weight", None)
        weight = self.module.weight if effective is None else effective()
        bias = self.module.bias.detach().to(x) if self.has_bias else None
        return functional.linear(x, weight.detach().to(x), bias)

    def activated(self, z: Tensor) -> Tensor:
        """Return the activation of ``z``."""
        return z if self.activation is None else self.activation(z)


@dataclass(frozen=True, eq=False)
class Chain:
    """The layers of a network in the order in which they run."""

    layers: tuple[AffineLayer, ...]

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def width_in(self) -> int:
        """Number of features of an input."""
        return self.layers[0].module.in_features

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each station ``1..L``; the last one is the network's output."""
        return tuple(layer.module.out_features for layer in self.layers)

    @property
    def device(self) -> torch.device:
        """Device of the first weight."""
        return self.layers[0].module.weight.device

    def stations(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return ``(before, after)`` the activation of every layer, ``[n, d_l]`` each.

        Args:
            x: inputs ``[n, d_0]``, float64, on the chain's device.
        """
        found = []
        for layer in self.layers:
            z = layer.affine(x)
            x = layer.activated(z)
            found.append((z, x))
        return found


def read_chain(net: nn.Module) -> Chain:
    """Return the chain that ``net`` computes.

    Linear maps, elementwise activations (modules or functions), dropout (ignored, as in evaluation), identity
    and a leading flatten are understood.

    Raises:
        UnsupportedModelError: If the network branches, has fewer than two affine layers, or holds something
            that is neither affine nor an elementwise activation; the message names it.
    """
    inner = getattr(net, "_orig_mod", None)  # torch.compile's wrapper
    net = inner if isinstance(inner, nn.Module) else net
    layers: list[AffineLayer] = []
    for name, step in _steps(net):
        if isinstance(step, nn.Linear):
            layers.append(AffineLayer(name, step, None, "none"))
        elif not layers or layers[-1].activation is not None:
            where = "before the first affine map" if not layers else f"after {layers[-1].activation_name}"
            raise _unsupported(f"{name} stands {where}; each affine map may have one activation behind it")
        else:
            _check_elementwise(name, step, layers[-1].module.weight.device)
            layers[-1] = AffineLayer(layers[-1].name, layers[-1].module, step, name)
    if len(layers) < 2:
        raise _unsupported(f"a chain needs at least 2 affine layers (nn.Linear), found {len(layers)}")
    for one, two in pairwise(layers):
        if one.module.out_features != two.module.in_features:
            raise _unsupported(
                f"{one.name} gives {one.module.out_features} features, {two.name} takes {two.module.in_features}"
            )
    return Chain(tuple(layers))


def _steps(net: nn.Module) -> Iterable[tuple[str, Any]]:
    """Yield ``(name, linear or callable)`` in running order; passive steps are left out."""
    tracer = _Tracer()
    try:
        graph = tracer.trace(net)
    except Exception as error:  # tracing runs the user's forward, so anything may come
        raise _unsupported(f"forward of {type(net).__name__} cannot be traced ({error})") from error
    before: fx.Node | None = None
    linears = 0
    for node in graph.nodes:
        if node.op == "output":
            continue
        inputs = node.all_input_nodes
        if (before is None) != (node.op == "placeholder") or (before is not None and inputs != [before]):
            raise _unsupported(f"{node.name} does not take exactly the output of the step before it")
        if before is not None:
            step = _callable_of(node, net)
            flatten = isinstance(step, nn.Flatten) or node.target in (torch.flatten, "flatten")
            if isinstance(step, nn.Linear):
                linears += 1
            if not (_is_passive(node, step) or (flatten and not linears)):
                yield _name_of(node, step), step
        before = node


class _Tracer(fx.Tracer):
    """Looks inside containers only: a module without children is one step."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(m.children())


def _callable_of(node: fx.Node, net: nn.Module) -> Any:
    if node.op == "call_module":
        module = net.get_submodule(str(node.target))
        if isinstance(module, nn.PReLU):
            slope = module.weight.detach()
            return lambda z: functional.prelu(z, slope.to(z))  # its own forward refuses another dtype
        # forward, not the module itself: the user's hooks must not see the bound's inputs.
        return module if isinstance(module, (nn.Linear, nn.Flatten, nn.Identity, *_DROPOUT)) else module.forward
    if node.op == "call_function":
        function, rest, keywords = node.target, node.args[1:], dict(node.kwargs)
        keywords.pop("inplace", None)
        return lambda z: function(z, *rest, **keywords)  # type: ignore[operator]
    if node.op == "call_method":
        method, rest, keywords = str(node.target), node.args[1:], dict(node.kwargs)
        return lambda z: getattr(z, method)(*rest, **keywords)
    raise _unsupported(f"{node.name} ({node.op}) is neither an affine map nor an activation")


def _name_of(node: fx.Node, step: Any) -> str:
    owner = getattr(step, "__self__", step)
    if node.op == "call_module":
        return f"{node.target} ({type(owner).__name__})"
    return getattr(node.target, "__name__", str(node.target))


def _is_passive(node: fx.Node, step: Any) -> bool:
    return isinstance(step, (nn.Identity, *_DROPOUT)) or node.target in _PASSIVE_FUNCTIONS


def _check_elementwise(name: str, step: Activation, device: torch.device) -> None:
    """Refuse what is not the same function of every entry, such as a norm, a softmax or a convolution."""
    owner = getattr(step, "__self__", None)
    z = torch.linspace(-3.0, 3.0, 24, dtype=torch.float64, device=device)
    found = None
    if not isinstance(owner, (*_MIXING, nn.RReLU)):
        try:
            with torch.no_grad():
                found, again = step(z.clone().view(4, 6)), step(z.flip(0).clone().view(8, 3))
        except Exception:  # a foreign module may raise anything on a shape that it does not expect
            found = None
    if (
        not isinstance(found, Tensor)
        or found.numel() != z.numel()
        or again.numel() != z.numel()
        or not torch.allclose(found.flatten().double(), again.flatten().flip(0).double())
    ):
        raise _unsupported(
            f"{name} is not a deterministic elementwise function: the layer's activation cannot be found"
        )


def _unsupported(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"net: {what}. Expected a chain of nn.Linear and elementwise activations, such as "
        "nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 100))."
    )
