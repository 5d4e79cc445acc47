"""Replacement weights put into a model in the middle of its training, and taken out again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from peelwise.act.blocks import unwrapped
from peelwise.errors import OptionError

Moments = Literal["first", "all", "keep"]


@dataclass(eq=False)
class AppliedWitness:
    """What was changed, and how to take it back.

    Attributes:
        names: parameters that were changed.
    """

    names: tuple[str, ...]
    _weights: dict[str, tuple[nn.Parameter, Tensor, Tensor]] = field(repr=False)  # parameter, before, after
    _state: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = field(repr=False)  # live, before

    @torch.no_grad()
    def revert(self) -> bool:
        """Take the change out again; a second call does nothing.

        A parameter that nothing has moved since is restored to the bit, and so are its moments. From one that training
        has moved the change is subtracted, so that what it learned meanwhile stays, and its moments are left.

        Returns:
            Whether everything was restored to the bit.
        """
        exact = True
        for name, (parameter, before, after) in self._weights.items():
            if not _same_everywhere(parameter, after):
                parameter.sub_((after - before).to(parameter.dtype))
                exact = False
                continue
            parameter.copy_(before)
            live, saved = self._state.get(name, ({}, {}))
            for key, value in saved.items():
                live[key].copy_(value)
        self._weights, self._state = {}, {}
        return exact


@torch.no_grad()
def apply_witness_(
    model: nn.Module,
    witness: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    kind: str = "composed",
    scale: float = 1.0,
    moments: Moments = "first",
) -> AppliedWitness:
    """Add a dense witness to the weights of a model that trains: ``W <- W + scale D``, reversibly.

    Moments of an optimiser were gathered at the old weights. ``moments="first"`` sets the running means of gradients
    (Adam's first moment, momentum) of the changed matrices to zero, since they point along a way that is no longer the
    model's, and keeps the second moments, which say how large gradients are: the next steps are neither in an old
    direction nor of full length. ``"all"`` also drops the second moments and the count of steps, after which Adam's
    next step has its full rate in every weight; ``"keep"`` leaves everything.

    Args:
        model: the module in training; wrappers of ``torch.compile`` and DDP are looked through. With DDP or
            ``fully_shard`` call it in all processes with the same whole witness.
        witness: change per linear layer ``[d_out, d_in]``, one more column where it has a bias, by the layer's name, or
            as an audit's ``witness.safetensors`` has it, by ``kind/name``.
        optimizer: that steps the model.
        kind: which of an audit's witnesses: ``"composed"``, ``"block-3"`` and so on.
        scale: factor on the change.
        moments: see above.

    Returns:
        What takes it back.

    Raises:
        OptionError: If a layer does not exist, shapes differ, a number is not finite, or nothing would be changed. The
            model is then as it was.
    """
    if moments not in ("first", "all", "keep"):
        raise OptionError(f'moments: expected "first", "all" or "keep", got {moments!r}.')
    changes = _by_parameter(unwrapped(model), _of_kind(witness, kind))
    weights: dict[str, tuple[nn.Parameter, Tensor, Tensor]] = {}
    state: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    for name, (parameter, change) in changes.items():
        before = parameter.detach().clone()
        parameter.add_(_placed(scale * change.float(), parameter))
        weights[name] = parameter, before, parameter.detach().clone()
        if optimizer is not None and moments != "keep":
            state[name] = _reset(optimizer, parameter, moments)
    return AppliedWitness(tuple(weights), weights, state)


def _placed(change: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole change as the parameter lies: on its device, in its dtype, in parts where it is sharded."""
    change = change.to(device=parameter.device, dtype=parameter.dtype)
    if not hasattr(parameter, "placements"):
        return change
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(change.contiguous(), parameter.device_mesh, parameter.placements)


def _same_everywhere(parameter: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal; of sharded ones, whether all parts are, in all processes alike."""
    if not hasattr(parameter, "placements"):
        return torch.equal(parameter, other)
    from torch.distributed.tensor import DTensor

    different = (parameter != other).any()
    assert isinstance(different, DTensor)
    return not bool(different.full_tensor())


def _of_kind(witness: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    prefix = f"{kind}/"
    if any("/" in name for name in witness):
        found = {name.removeprefix(prefix): change for name, change in witness.items() if name.startswith(prefix)}
        if not found:
            kinds = ", ".join(sorted({name.split("/")[0] for name in witness}))
            raise OptionError(f"The witness has no part {kind!r}; it has {kinds}.")
    else:
        found = dict(witness)
    if not found:
        raise OptionError("The witness is empty: nothing would be changed.")
    if any(name.endswith((".codes", ".format")) for name in found):
        raise OptionError(
            "The witness is of low-bit layers: codes, not changes. Use peelwise.apply on the certificate."
        )
    return found


def _by_parameter(model: nn.Module, changes: Mapping[str, Tensor]) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Return every change as that of a parameter, all of them checked."""
    modules = {name.replace("_orig_mod.", ""): module for name, module in model.named_modules()}
    out: dict[str, tuple[nn.Parameter, Tensor]] = {}
    for name, change in changes.items():
        module = modules.get(name)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(weight, nn.Parameter):
            raise OptionError(f"The witness changes {name}, and the model has no linear layer of that name.")
        transposed = type(module).__name__ == "Conv1D"
        d_out, d_in = reversed(weight.shape) if transposed else weight.shape
        with_bias = isinstance(bias, nn.Parameter)
        if tuple(change.shape) != (d_out, d_in + with_bias):
            raise OptionError(f"The witness for {name} is {tuple(change.shape)}, expected {(d_out, d_in + with_bias)}.")
        if not bool(torch.isfinite(change).all()):
            raise OptionError(f"The witness for {name} holds NaN or Inf.")
        matrix = change[:, :d_in]
        out[f"{name}.weight"] = weight, matrix.T if transposed else matrix
        if isinstance(bias, nn.Parameter):
            out[f"{name}.bias"] = bias, change[:, -1]
    return out


def _reset(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, moments: Moments
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Set moments to zero; return the live state and a copy of what was changed."""
    live = {key: value for key, value in optimizer.state.get(parameter, {}).items() if isinstance(value, Tensor)}
    wanted = ("exp_avg", "momentum_buffer") if moments == "first" else tuple(live)
    changed = {key: live[key] for key in wanted if key in live}
    saved = {key: value.clone() for key, value in changed.items()}
    for value in changed.values():
        value.zero_()
    return changed, saved
