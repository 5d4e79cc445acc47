"""Mixtures of experts: the matrices of every expert as linear layers of their own, called with the tokens routed to it.

Experts of transformers are parameters of three dimensions, ``[experts, d_out, d_in]`` or transposed, multiplied by one
grouped product: there is nothing to hook. While a model is measured, each such module runs expert by expert instead:

    y_t = sum_e  w_te  E_e(x_t)        over the experts e that token t was routed to, with routing weights w_te

and every matrix of every ``E_e`` is an `ExpertLinear`, a module that owns nothing: its weight is a view of the
parameter. Hooks, splices and merged witnesses then treat it as any other linear layer. Routers are left as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peelwise.errors import UnsupportedModelError
from peelwise.model.replaced import forward_replaced


@dataclass(frozen=True)
class Stack:
    """The matrices of all experts in one parameter, one below the other.

    Attributes:
        parameter: its name in the module of the experts.
        count: how many matrices it holds.
        transposed: whether each is kept as ``[d_in, d_out]``.
        bias: name of the parameter of their biases ``[experts, d_out]``, or empty.
        owner: path from the experts' module to the one that holds the parameter; empty for itself.
    """

    parameter: str
    count: int
    transposed: bool = False
    bias: str = ""
    owner: str = ""


class ExpertLinear(nn.Module):
    """One expert's matrix: ``y = x W^T + b`` with ``W`` a view of the parameter that holds those of all experts.

    Attributes:
        rows: where it is known, which tokens ``[n]`` of all that are given to the mixture it is called with.
    """

    def __init__(self, owner: nn.Module, stack: Stack, index: int) -> None:
        super().__init__()
        # Weak: a view must not keep the model alive, nor be one of its modules.
        self._owner, self.stack, self.index = weakref.ref(owner), stack, index
        self.rows: Tensor | None = None

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter."""
        owner = self._owner()
        assert owner is not None
        return owner

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the matrices of all experts."""
        found: nn.Parameter = getattr(self.owner, self.stack.parameter)
        return found

    @property
    def weight(self) -> Tensor:
        """``W [d_out, d_in]``, a view; with its part of the gradient, where training has left one."""
        weight = self.matrix(self.parameter.detach())
        if isinstance(self.parameter.grad, Tensor):
            weight.grad = self.matrix(self.parameter.grad)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """``b [d_out]``, a view, or ``None``."""
        if not self.stack.bias:
            return None
        whole = getattr(self.owner, self.stack.bias)
        bias: Tensor = whole.detach()[self.index]
        if isinstance(whole.grad, Tensor):
            bias.grad = whole.grad[self.index]
        return bias

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of its matrix, also where the parameter is spread over processes."""
        parameter, last = self.parameter, self.parameter.shape[-1]
        rows = parameter.numel() // (self.stack.count * last)
        return (last, rows) if self.stack.transposed else (rows, last)

    def matrix(self, whole: Tensor) -> Tensor:
        """Return the view ``[d_out, d_in]`` of its matrix in the parameter, or in one that stands for it."""
        one = whole.view(self.stack.count, -1, whole.shape[-1])[self.index]
        return one.T if self.stack.transposed else one

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that it is a part of."""
        yield "weight", self.parameter
        if self.stack.bias:
            yield "bias", getattr(self.owner, self.stack.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b`` ``[n, d_out]`` for ``x [n, d_in]``."""
        weight = self.weight
        return F.linear(x.to(weight.dtype), weight, self.bias)


Layers = dict[str, list[ExpertLinear]]  # by the name of their parameter
Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Kind:
    """One way of keeping and running experts.

    Attributes:
        name: of the kind, for people.
        stacks: their parameters, in the order in which they run; ``None`` for a module of another kind.
        run: the module's forward, expert by expert: of the module, its layers, and what it is called with.
    """

    name: str
    stacks: Callable[[nn.Module], Sequence[Stack] | None]
    run: Run


def _routed(
    hidden: Tensor, index: Tensor, weights: Tensor, experts: int, of_expert: Callable[[int, Tensor, Tensor], Tensor]
) -> Tensor:
    """Return the sum of the experts' outputs ``[n, d]`` by routing weights.

    Args:
        hidden: ``[n, d]``.
        index: which experts each token is routed to, ``[n, k]``; numbers beyond ``experts`` are no expert.
        weights: routing weights ``[n, k]``.
        experts: how many there are.
        of_expert: the output of an expert, of its number, its tokens' inputs, and which tokens they are.
    """
    out = torch.zeros_like(hidden, dtype=torch.float32 if hidden.dtype.itemsize < 4 else hidden.dtype)
    for expert in range(experts):
        rows, place = (index == expert).nonzero(as_tuple=True)
        if rows.numel():
            y = of_expert(expert, hidden[rows], rows) * weights[rows, place, None]
            out = out.index_add(0, rows, y.to(out.dtype))
    return out.to(hidden.dtype)


def _called(layer: ExpertLinear, x: Tensor, rows: Tensor | None) -> Tensor:
    layer.rows = rows
    try:
        y: Tensor = layer(x)
        return y
    finally:
        layer.rows = None


# -- transformers' common protocol -------------------------------------------------------------------------


def _protocol(module: Any) -> Sequence[Stack] | None:
    """Experts with the flags that ``use_experts_implementation`` of transformers sets."""
    flags = module.__dict__
    if not {"has_gate", "has_bias", "is_transposed", "is_concatenated"} <= flags.keys():
        return None
    first = "gate_up_proj" if flags["has_gate"] else "up_proj"
    parameters = module._parameters
    if not all(isinstance(parameters.get(name), nn.Parameter) for name in (first, "down_proj")):
        return None  # quantised, or replaced by modules
    count, transposed, bias = len(parameters[first]), flags["is_transposed"], flags["has_bias"]
    return [Stack(name, count, transposed, f"{name}_bias" if bias else "") for name in (first, "down_proj")]


def _run_protocol(module: Any, layers: Layers, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    first, last = layers.values()
    middle = module._apply_gate if module.has_gate else module.act_fn

    def of_expert(expert: int, x: Tensor, rows: Tensor) -> Tensor:
        y = _called(last[expert], middle(_called(first[expert], x, rows)), rows)
        # A flag that transformers 5.10 does not know yet.
        return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y

    flat = hidden.reshape(-1, hidden.shape[-1])
    index, weights = index.reshape(len(flat), -1), weights.reshape(len(flat), -1)
    return _routed(flat, index, weights, len(first), of_expert).view(hidden.shape)


# -- models with experts of their own ------------------------------------------------------------------------


def _of_class(name: str, *stacks: Callable[[Any], Stack]) -> Callable[[nn.Module], Sequence[Stack] | None]:
    """Return what finds the parameters of a class of transformers."""

    def found(module: nn.Module) -> Sequence[Stack] | None:
        known = type(module).__name__ == name and type(module).__module__.startswith("transformers.")
        return [stack(module) for stack in stacks] if known else None

    return found


def _run_llama4(module: Any, layers: Layers, hidden: Tensor) -> Tensor:
    """Llama 4 gives every token to every expert, times its routing weight, which is zero where it is not routed."""
    first, last = layers.values()
    per_expert = hidden.reshape(len(first), -1, hidden.shape[-1])  # [experts, n, d]
    out = []
    for expert, x in enumerate(per_expert):
        rows = (x != 0).any(dim=-1).nonzero()[:, 0]
        gate, up = _called(first[expert], x[rows], rows).chunk(2, dim=-1)
        y = _called(last[expert], up * module.act_fn(gate), rows)
        out.append(torch.zeros_like(x).index_add(0, rows, y.to(x.dtype)))
    return torch.stack(out).reshape(hidden.shape)


def _run_longcat(module: Any, layers: Layers, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """LongCat's last experts hand their tokens on as they are."""
    first, last = layers.values()

    def of_expert(expert: int, x: Tensor, rows: Tensor) -> Tensor:
        if expert >= len(last):
            return x
        gate, up = _called(first[expert], x, rows).chunk(2, dim=-1)
        return _called(last[expert], module.act_fn(gate) * up, rows)

    return _routed(hidden, index, weights, module.total_experts, of_expert)


def _run_dbrx(module: Any, layers: Layers, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    gates, ups, downs = layers.values()

    def of_expert(expert: int, x: Tensor, rows: Tensor) -> Tensor:
        gate = module.mlp.activation_fn(_called(gates[expert], x, rows))
        return _called(downs[expert], gate * _called(ups[expert], x, rows), rows)

    flat = hidden.reshape(-1, hidden.shape[-1])
    return _routed(flat, index, weights, module.num_experts, of_expert).view(len(hidden), -1, hidden.shape[-1])


def _run_parallel(module: Any, layers: Layers, inputs: Tensor, expert_size: Sequence[int]) -> Tensor:
    """One matrix per expert for inputs that come sorted by expert; which tokens they are is not known here."""
    (each,) = layers.values()
    parts = torch.split(inputs, list(expert_size))
    return torch.cat([_called(layer, x, None) for layer, x in zip(each, parts, strict=True) if len(x)])


def _dbrx_stack(name: str, *, transposed: bool = False) -> Callable[[Any], Stack]:
    return lambda module: Stack(name, module.num_experts, transposed, owner="mlp")


# The first that knows a module runs it.
KINDS: tuple[Kind, ...] = (
    Kind("transformers' experts", _protocol, _run_protocol),
    Kind(
        "Llama 4",
        _of_class(
            "Llama4TextExperts",
            lambda m: Stack("gate_up_proj", m.num_experts, transposed=True),
            lambda m: Stack("down_proj", m.num_experts, transposed=True),
        ),
        _run_llama4,
    ),
    Kind(
        "LongCat",
        _of_class(
            "LongcatFlashExperts",
            lambda m: Stack("gate_up_proj", m.total_experts),
            lambda m: Stack("down_proj", m.num_routed_experts),
        ),
        _run_longcat,
    ),
    Kind(
        "DBRX",
        _of_class("DbrxExperts", _dbrx_stack("w1"), _dbrx_stack("v1"), _dbrx_stack("w2", transposed=True)),
        _run_dbrx,
    ),
    Kind(
        "parallel experts",
        _of_class("JetMoeParallelExperts", lambda m: Stack("weight", m.num_experts)),
        _run_parallel,
    ),
)


def kind_of(module: nn.Module) -> tuple[Kind, Sequence[Stack]] | None:
    """Return how a module keeps and runs its experts, or ``None`` if it is none of the kinds that are known."""
    for kind in KINDS:
        stacks = kind.stacks(module)
        if stacks:
            return kind, stacks
    return None


# A module has the same views whenever it is asked, so that hooks of one caller are seen by all; they go with it.
_VIEWS: weakref.WeakKeyDictionary[nn.Module, Layers] = weakref.WeakKeyDictionary()


def layers_of(module: nn.Module) -> Layers:
    """Return the experts' linear layers of a module by parameter, none if it holds no experts of a known kind."""
    known = _VIEWS.get(module)
    if known is not None:
        return known
    found = kind_of(module)
    if found is None:
        return {}
    _, stacks = found
    made = {
        f"{stack.owner}.{stack.parameter}".lstrip("."): [
            ExpertLinear(module.get_submodule(stack.owner), stack, index) for index in range(stack.count)
        ]
        for stack in stacks
    }
    _VIEWS[module] = made
    return made


class _ByExpert:
    """The forward of a module of experts that calls their layers one by one.

    It looks its layers up when it is called, so that of a copied module it calls those of the copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        found = kind_of(self.module)
        assert found is not None
        try:
            return found[0].run(self.module, layers_of(self.module), *args, **kwargs)
        except TypeError as error:
            raise UnsupportedModelError(
                f"Not yet: {type(self.module).__name__} is called in a way that peelwise does not know: {error}"
            ) from error


@contextmanager
def experts_called(model: nn.Module) -> Iterator[None]:
    """Let all experts of a model run one by one inside the context, and as they did afterwards."""
    with ExitStack() as stack:
        for module in list(model.modules()):
            if kind_of(module) is not None and not isinstance(module.__dict__.get("forward"), _ByExpert):
                stack.enter_context(forward_replaced(module, _ByExpert(module)))
        yield


def call_experts_(model: nn.Module) -> None:
    """Let all experts of a model of ours (a copy, one made anew) run one by one from now on."""
    for module in model.modules():
        if kind_of(module) is not None:
            module.__dict__["forward"] = _ByExpert(module)


@contextmanager
def experts_as_they_are(module: nn.Module) -> Iterator[None]:
    """Let experts run by the model's own code inside the context, although a context around it says otherwise."""
    replaced = [m for m in module.modules() if isinstance(m.__dict__.get("forward"), _ByExpert)]
    made = [m.__dict__.pop("forward") for m in replaced]
    try:
        yield
    finally:
        for m, forward in zip(replaced, made, strict=True):
            m.__dict__["forward"] = forward
