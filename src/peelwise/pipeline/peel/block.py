"""One reference block: a copy of a block with weights of its own, stored as changes to the model's."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peelwise.model.layers import Block, LinearMap, unwrapped
from peelwise.pipeline.bench import WITNESS_DTYPE

Changes = dict[str, Tensor]  # full parameter name -> change, in the format it is stored in


class ReferenceBlock:
    """A deep copy of a block of the model, at ``own parameters + changes``; the model itself is never written.

    Changes are rounded to the format of the witness file whenever they are set, so every loss that is ever
    measured with the block is the loss of what the file holds.

    Args:
        own: the model's block.
        changes: by full name; parameters that are not named are the model's own.
    """

    def __init__(self, own: Block, changes: Mapping[str, Tensor] | None = None) -> None:
        module = copy.deepcopy(unwrapped(own.module)).requires_grad_(False).eval()
        self.own = own
        linears = tuple(
            LinearMap(m.name, module.get_submodule(m.name.removeprefix(f"{own.name}.")), m.transposed)
            for m in own.linears
        )
        self.block = Block(own.index, own.name, module, linears)
        self.changes: Changes = {}
        self._originals = dict(_named_parameters(own.name, unwrapped(own.module)))
        self._copies = dict(_named_parameters(own.name, module))
        if changes:
            self.set(changes)

    @torch.no_grad()
    def set(self, changes: Mapping[str, Tensor]) -> None:
        """Put the parameters at their own values plus ``changes``; all others go back to their own."""
        for name in self.changes.keys() - changes.keys():
            self._copies[name].copy_(self._originals[name])
        rounded = {name: change.to(WITNESS_DTYPE) for name, change in changes.items()}
        for name, change in rounded.items():
            original = self._originals[name]
            self._copies[name].copy_(original.float() + change.to(original.device).float())
        self.changes = rounded

    def moved(self, steps: Mapping[LinearMap, Tensor], scale: float) -> Changes:
        """Return the present changes plus ``scale`` times a step per map, ``[d_out, d_in (+1)]`` each."""
        out = dict(self.changes)
        for linear, step in steps.items():
            weight = step[:, :-1] if linear.has_bias else step
            parts = {"weight": weight.T if linear.transposed else weight}
            if linear.has_bias:
                parts["bias"] = step[:, -1]
            for kind, part in parts.items():
                name = f"{linear.name}.{kind}"
                before = out.get(name)
                out[name] = scale * part.float() + (0.0 if before is None else before.float())
        return out

    def from_initialisation(self, fresh: Block) -> Changes:
        """Return the changes that put the block at the values of ``fresh``, the same block initialised anew."""
        values = dict(_named_parameters(self.own.name, unwrapped(fresh.module)))
        return {name: values[name].float() - own.float() for name, own in self._originals.items()}


def _named_parameters(prefix: str, module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(f"{prefix}.{name}", parameter.detach()) for name, parameter in module.named_parameters()]
