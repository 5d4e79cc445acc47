"""Whether codes, scales and offsets are ones that a format can write down: what a witness at the same bits must be."""

from __future__ import annotations

import torch
from torch import Tensor

from peelwise.errors import FormatError
from peelwise.formats.base import Encoded, Format, check_support
from peelwise.formats.masked import Masked
from peelwise.formats.scaled import Scaled


def scaled_part(form: Format) -> Scaled | None:
    """Return the format of the weights on the support, if it is one of codes and scales."""
    inner = form.inner if isinstance(form, Masked) else form
    return inner if isinstance(inner, Scaled) else None


def check_member(encoded: Encoded, form: Format, shape: tuple[int, int]) -> None:
    """Refuse what a format of codes and scales cannot hold for a matrix of this shape.

    Args:
        encoded: codes, scales and offsets.
        form: the format they are said to be of.
        shape: ``(d_out, d_in)``.

    Raises:
        FormatError: With the first thing that is not of the format.
    """
    inner = scaled_part(form)
    if inner is None or encoded.scales is None:
        raise FormatError(f"{form.name}: expected codes with scales. Dense weights have no codes to check.")
    if tuple(encoded.codes.shape) != shape or encoded.codes.is_floating_point() != inner.levels.dtype.is_floating_point:
        raise FormatError(
            f"{form.name}: expected {'codes' if inner.levels.dtype.is_floating_point else 'integer codes'} {shape}, "
            f"got {_said(encoded.codes)}."
        )
    if (encoded.support is not None) != isinstance(form, Masked):
        raise FormatError(f"{form.name}: a support is expected with a masked format, and only there.")
    codes = encoded.codes if encoded.codes.is_floating_point() else encoded.codes.long()
    if encoded.support is not None:
        check_support(encoded.support, shape)
        codes = codes[encoded.support]
    _check_codes(codes, inner, "code")
    per_scale = inner.layout.rows(shape[0]), shape[1] // inner.layout.columns(shape[1])
    _check_stored(encoded.scales, inner, per_scale, "scales")
    if (encoded.zeros is not None) != (inner.offset != "none"):
        raise FormatError(f"{form.name}: its offset is {inner.offset}, which goes with other stored values than these.")
    if encoded.zeros is None:
        return
    if inner.offset == "minimum":
        _check_stored(encoded.zeros, inner, per_scale, "minima")
        return
    if tuple(encoded.zeros.shape) != per_scale or encoded.zeros.is_floating_point():
        raise FormatError(f"{form.name}: expected integer zero points {per_scale}, got {_said(encoded.zeros)}.")
    _check_codes(encoded.zeros.long(), inner, "zero point")


def _check_codes(codes: Tensor, form: Scaled, what: str) -> None:
    levels = form.levels
    wrong = ~levels.contains(codes)
    if bool(wrong.any()):
        raise FormatError(
            f"{form.name}: {what} {codes[wrong][0].item():g} is none of its {levels.count} codes from {levels.low:g} "
            f"to {levels.high:g} ({int(wrong.sum())} such values)."
        )


def _check_stored(values: Tensor, form: Scaled, shape: tuple[int, int], what: str) -> None:
    if tuple(values.shape) != shape or values.dtype != form.scale_dtype:
        raise FormatError(f"{form.name}: expected {what} {shape} in {_plain(form.scale_dtype)}, got {_said(values)}.")
    if not bool(values.isfinite().all()):
        raise FormatError(f"{form.name}: {what} hold NaN or Inf.")


def same_support(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two supports are the same, or both absent."""
    return a is b if a is None or b is None else torch.equal(a, b.to(a.device))


def _said(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} in {_plain(tensor.dtype)}"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
