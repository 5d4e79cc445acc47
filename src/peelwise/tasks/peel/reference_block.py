"""One reference block: a copy of a block with weights of its own, stored as changes or codes of the model's maps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peelwise.engine.opening import low_bit_layers
from peelwise.engine.session import WITNESS_DTYPE
from peelwise.formats.base import Encoded
from peelwise.formats.membership import scaled_part
from peelwise.model.layers import Block, LinearLayer, linear_layers, unwrapped
from peelwise.model.splice import spliced
from peelwise.model.weights.held import Held

EFFECTIVE = "effective_weight"  # what changes of a low-bit map are named where its reference is dense

Changes = dict[str, Tensor]  # full parameter name -> change, in the dtype it is stored in
Codes = dict[str, Encoded]  # full name of a low-bit map -> the codes that its reference holds


@dataclass(frozen=True)
class State:
    """Where a reference block is. What is not named is as in the model.

    Attributes:
        changes: of parameters, by full name; of the weight that a low-bit map computes with under ``EFFECTIVE``.
        codes: of low-bit maps that stay inside their formats.
    """

    changes: Changes = field(default_factory=dict)
    codes: Codes = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether anything is not the model's own."""
        return bool(self.changes or self.codes)

    @property
    def bytes(self) -> int:
        """Size of the tensors."""
        codes = [t for c in self.codes.values() for t in (c.codes, c.scales, c.zeros) if t is not None]
        return sum(t.numel() * t.element_size() for t in (*self.changes.values(), *codes))

    def moved(self, steps: Mapping[LinearLayer, Tensor], scale: float) -> State:
        """Return this state plus ``scale`` times a step per dense map, ``[d_out, d_in (+1)]`` each."""
        out = dict(self.changes)
        for linear, step in steps.items():
            weight = step[:, :-1] if linear.has_bias else step
            parts = {EFFECTIVE if linear.low_bit else "weight": weight.T if linear.transposed else weight}
            if linear.has_bias:
                parts["bias"] = step[:, -1]
            for kind, part in parts.items():
                _add(out, f"{linear.name}.{kind}", scale * part)
        return State(out, self.codes)

    def recoded(self, codes: Mapping[LinearLayer, Encoded], biases: Mapping[LinearLayer, Tensor]) -> State:
        """Return this state with other codes, and steps of biases ``[d_out]`` beside them."""
        changes = dict(self.changes)
        for linear, bias in biases.items():
            _add(changes, f"{linear.name}.bias", bias)
        return State(changes, self.codes | {linear.name: encoded for linear, encoded in codes.items()})


class ReferenceBlock:
    """A deep copy of a block of the model, at ``own parameters + changes``; the model itself is never written.

    Changes are rounded to the dtype of the witness file whenever they are set, so every loss that is ever
    measured with the block is the loss of what the file holds. Low-bit maps hold codes, scales and offsets of their
    format and run with what these stand for, or with any weights at all if the reference is to be ``dense``.

    Args:
        own: the model's block.
        state: where to start; nothing changed if it is left out.
        dense: whether low-bit maps may leave their formats.
    """

    def __init__(self, own: Block, state: State | None = None, *, dense: bool = False) -> None:
        module = copy.deepcopy(unwrapped(own.module)).requires_grad_(False).eval()
        self.own = own
        asked = {linear.name for linear in own.linears}
        linears = tuple(linear for linear in linear_layers(module, own.name) if linear.name in asked)
        self.block = Block(own.index, own.name, module, linears)
        self.held: dict[LinearLayer, Held] = {} if dense else low_bit_layers((self.block,))
        self.state = State()
        self._spliced = ExitStack()
        self._originals = dict(_named_parameters(own.name, unwrapped(own.module)))
        self._copies = dict(_named_parameters(own.name, module))
        if state is not None:
            self.set(state)

    def codes(self, linear: LinearLayer) -> Encoded:
        """Return the codes that a low-bit map of the reference is at."""
        return self.state.codes.get(linear.name, self.held[linear].encoded)

    @torch.no_grad()
    def set(self, state: State) -> None:
        """Go to ``state``; whatever it does not name goes back to the model's own."""
        changes = {name: change.to(WITNESS_DTYPE) for name, change in state.changes.items()}
        for name in self._copies.keys() & (self.state.changes.keys() | changes.keys()):
            own = self._originals[name]
            change = changes.get(name)
            self._copies[name].copy_(own if change is None else own.float() + change.to(own.device).float())
        self.state = State(changes, dict(state.codes))
        self._spliced.close()
        self._spliced.enter_context(spliced(self._weight_changes()))

    def initialised(self, fresh: Block) -> State:
        """Return the state that puts the block at the values of ``fresh``, the same block initialised anew.

        Maps inside a format are at the values of ``fresh`` rounded to it.
        """
        values = dict(_named_parameters(self.own.name, unwrapped(fresh.module)))
        low_bit = {f"{linear.name}.weight" for linear in self.block.linears if linear.low_bit}
        changes = {n: values[n].float() - own.float() for n, own in self._originals.items() if n not in low_bit}
        codes: Codes = {}
        for linear, own, other in zip(self.block.linears, self.own.linears, fresh.linears, strict=True):
            if linear in self.held:
                codes[linear.name] = _rounded(_latent(other), self.held[linear])
            elif linear.low_bit:
                changes[f"{linear.name}.{EFFECTIVE}"] = other.weight().float() - own.weight().float()
        return State(changes, codes)

    def _weight_changes(self) -> dict[LinearLayer, Tensor]:
        """Return what the low-bit maps add to the weights that they compute with."""
        out = {}
        for linear in self.block.linears:
            change = self.state.changes.get(f"{linear.name}.{EFFECTIVE}")
            if linear in self.held and linear.name in self.state.codes:
                held = self.held[linear]
                change = held.format.decode(self.state.codes[linear.name]).to(held.weight.device) - held.weight
            if change is not None:
                # The step of its bias is in the parameter already.
                out[linear] = nn.functional.pad(change.float(), (0, int(linear.has_bias)))
        return out


def _add(changes: Changes, name: str, step: Tensor) -> None:
    before = changes.get(name)
    changes[name] = step.float() + (0.0 if before is None else before.float())


def _rounded(weight: Tensor, held: Held) -> Encoded:
    """Return a weight in a format, on the support of what is held; one scale of the whole model stays as it is."""
    inner, own = scaled_part(held.format), held.encoded
    if inner is None or inner.layout.per != "model":
        return held.format.encode(weight, own.support)
    assert own.scales is not None
    return inner.quantized(weight.float(), own.scales, own.zeros, own.support)


def _latent(linear: LinearLayer) -> Tensor:
    held = linear.held()
    return linear.weight() if held is None or held.latent is None else held.latent


def _named_parameters(prefix: str, module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(f"{prefix}.{name}", parameter.detach()) for name, parameter in module.named_parameters()]
