"""Witness tensors: dense changes, or codes and scales of the format that a low-bit map has.

    KIND/MAP            the change of a dense map, [d_out, d_in (+1 with a bias)]
    KIND/MAP.codes      the codes of a low-bit map, and beside it .scales, .zeros, .support where the format has them,
                        .bias, the change of its bias, and .format, the bytes of the format's name

``KIND`` is ``composed`` or ``alone``; ``slope`` for a direction of which only the slope counts; ``stack`` for the codes
of a peel's references. Codes are read strictly: whatever the format of the map could not write down is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from peelwise.engine.refine import Refined
from peelwise.engine.session import WITNESS_DTYPE, Changes
from peelwise.errors import CertificateError, FormatError, UnsupportedModelError
from peelwise.formats.base import Encoded, Format
from peelwise.formats.membership import check_member, same_support, scaled_part
from peelwise.model.layers import Block, LinearLayer
from peelwise.model.weights.held import Held
from peelwise.model.weights.table import hold_

_PARTS = ("codes", "scales", "zeros", "support")
CODED_PARTS = (*_PARTS, "format")


def witness_tensors(kind: str, refined: Refined, held: Mapping[LinearLayer, Held]) -> dict[str, Tensor]:
    """Return what is stored of a refinement, in the dtypes that it was evaluated in."""
    out: dict[str, Tensor] = {}
    for linear, change in refined.changes.items():
        name, codes = f"{kind}/{linear.name}", refined.codes.get(linear)
        if codes is None:
            out[name] = as_stored(change)
            continue
        # Codes that nothing changed are those of the model, for every kind: the file wants tensors of its own.
        out |= {
            key: part.cpu().contiguous().clone()
            for key, part in coded_tensors(name, codes, held[linear].format).items()
        }
        if linear.has_bias:
            out[f"{name}.bias"] = as_stored(change[:, -1])
    return out


def dense_tensors(kind: str, changes: Mapping[LinearLayer, Tensor]) -> dict[str, Tensor]:
    """Return dense changes as they are stored."""
    return {f"{kind}/{m.name}": as_stored(c) for m, c in changes.items()}


def as_stored(change: Tensor) -> Tensor:
    """Return a dense change as it is stored; one that is in that dtype already, such as on disk, is no copy."""
    return change.to(WITNESS_DTYPE).cpu().contiguous()


def coded_tensors(name: str, encoded: Encoded, form: Format) -> dict[str, Tensor]:
    """Return codes, scales, zeros and support under ``name``, with the name of their format."""
    parts = {part: getattr(encoded, part) for part in _PARTS}
    found = {f"{name}.{part}": value for part, value in parts.items() if value is not None}
    return found | {f"{name}.format": _as_bytes(form.name)}


def codes_of(witness: Mapping[str, Tensor], kind: str, linear: LinearLayer, held: Held) -> Encoded | None:
    """Return the codes stored for a low-bit map, or ``None`` if the witness leaves it as it is.

    Raises:
        FormatError: If they are not of the format that the map holds, or the change stored for it is dense.
    """
    name, form = f"{kind}/{linear.name}", held.format
    if name in witness:
        raise FormatError(f"{linear.name} holds {form.name}, and the witness for it is dense: not at the same bits.")
    codes = witness.get(f"{name}.codes")
    if codes is None:
        return None
    stored = bytes(witness.get(f"{name}.format", torch.empty(0)).to(torch.uint8).tolist()).decode(errors="replace")
    if stored != form.name:
        raise FormatError(f"{linear.name} holds {form.name}, the witness for it is {stored or 'of no format'}.")
    encoded = Encoded(codes, *(witness.get(f"{name}.{part}") for part in _PARTS[1:]))
    try:
        check_member(encoded, form, (held.encoded.codes.shape[0], held.encoded.codes.shape[1]))
    except FormatError as error:
        raise FormatError(f"The witness for {linear.name}: {error}") from error
    if not same_support(encoded.support, held.encoded.support):
        raise FormatError(f"The witness for {linear.name} has another support than the map.")
    inner, own = scaled_part(form), held.encoded.scales
    shared = inner is not None and inner.layout.per == "model"
    if shared and own is not None and encoded.scales is not None and not torch.equal(encoded.scales, own.cpu()):
        raise FormatError(f"The witness for {linear.name} changes a scale that the whole model shares.")
    return encoded


def moved_to(encoded: Encoded, device: torch.device) -> Encoded:
    """Return codes, scales, zeros and support on a device."""
    return replace(encoded, **{p: v.to(device) for p in _PARTS if (v := getattr(encoded, p)) is not None})


def changes_of(witness: Mapping[str, Tensor], kind: str, blocks: tuple[Block, ...]) -> Changes:
    """Return the changes stored under ``kind`` for the maps of ``blocks``, float32, on their device.

    Raises:
        CertificateError: If a change has another shape than its map.
        FormatError: If a low-bit map would leave its format.
    """
    changes: Changes = {}
    for linear in (m for block in blocks for m in block.linears):
        held = linear.held() if linear.low_bit else None
        change = _dense(witness, kind, linear) if held is None else _coded(witness, kind, linear, held)
        if change is not None:
            changes[linear] = change
    return changes


@torch.no_grad()
def merge_(witness: Mapping[str, Tensor], kind: str, blocks: tuple[Block, ...]) -> bool:
    """Write the witness stored under ``kind`` into the model's own weights; return whether there was anything to write.

    Raises:
        CertificateError: If a module cannot take codes, or a change has another shape.
        FormatError: If a low-bit map would leave its format.
    """
    changes = changes_of(witness, kind, blocks)
    for linear, change in changes.items():
        held = linear.held() if linear.low_bit else None
        if held is None:
            _check_writable(linear)
            _add(linear.module.weight, (change[:, :-1] if linear.has_bias else change), transposed=linear.transposed)
        else:
            encoded = codes_of(witness, kind, linear, held)
            if encoded is not None:
                try:
                    hold_(linear.module, moved_to(encoded, linear.weight().device))
                except UnsupportedModelError as error:
                    raise CertificateError(
                        f"{linear.name}: {error} They are in witness.safetensors; or give its class a method "
                        "hold_(encoded), as peelwise.nn layers have."
                    ) from error
        if linear.has_bias:
            _add(linear.module.bias, change[:, -1], transposed=False)
    return bool(changes)


def _dense(witness: Mapping[str, Tensor], kind: str, linear: LinearLayer) -> Tensor | None:
    stored = witness.get(f"{kind}/{linear.name}")
    if stored is None:
        if f"{kind}/{linear.name}.codes" in witness:
            raise FormatError(f"{linear.name} is dense, and the witness for it is codes.")
        return None
    d_out, d_in = linear.weight().shape
    expected = d_out, d_in + int(linear.has_bias)
    if tuple(stored.shape) != expected:
        raise CertificateError(f"The witness for {linear.name} is {tuple(stored.shape)}, expected {expected}.")
    return stored.float().to(linear.weight().device)


def _coded(witness: Mapping[str, Tensor], kind: str, linear: LinearLayer, held: Held) -> Tensor | None:
    encoded = codes_of(witness, kind, linear, held)
    if encoded is None:
        return None
    weight = held.weight
    change = held.format.decode(encoded).to(weight.device) - weight
    if not linear.has_bias:
        return change
    bias = witness.get(f"{kind}/{linear.name}.bias")
    if bias is None or tuple(bias.shape) != (len(change),):
        raise CertificateError(f"The witness for {linear.name} lacks the change of its bias, [{len(change)}].")
    return torch.cat([change, bias.to(change)[:, None]], dim=1)


def _add(parameter: Tensor | nn.Module, change: Tensor, *, transposed: bool) -> None:
    assert isinstance(parameter, Tensor)
    change = change.to(parameter.device)
    parameter.copy_(parameter.float() + (change.T if transposed else change))


def _check_writable(linear: LinearLayer) -> None:
    """Refuse to add a change to bytes: rounded to whole numbers it would be another one, or none."""
    weight = linear.module.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
        kind = str(weight.dtype).removeprefix("torch.") if isinstance(weight, Tensor) else type(weight).__name__
        raise CertificateError(
            f"{linear.name} keeps its weight as {kind} (packed?), into which no change can be written: expected "
            "floating-point numbers. Apply the certificate to the model in the dtype that it was audited in."
        )


def _as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
