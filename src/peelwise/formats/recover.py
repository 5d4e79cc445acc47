"""Find the codes and scales of a matrix that is known to obey a format, from its values alone.

The rule for the scale differs from library to library, but the spacing of the values in use gives it away. Any codes
and scales that give the very same matrix will do. Eight bits rounded to bfloat16 are too many to be distinguishable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peelwise.errors import FormatError
from peelwise.formats.base import Encoded, Format, check_matrix
from peelwise.formats.masked import Masked
from peelwise.formats.scaled import Scaled
from peelwise.formats.superblock import SuperBlock
from peelwise.formats.uneven import Uneven

# Of the spacing: what products of codes and scales in bfloat16 are off by at 32 levels, with a margin.
_TOLERANCE = 0.1


def recover(W: Tensor, form: Format) -> Encoded:
    """Return codes, scales and offsets that decode to ``W``.

    Args:
        W: ``[d_out, d_in]``, the weights in use.
        form: the format that they are said to obey.

    Raises:
        FormatError: If they do not.
    """
    check_matrix(W, None)
    inner = form.inner if isinstance(form, Masked) else form
    support = form.pattern.support(W) if isinstance(form, Masked) else None
    if support is not None and bool((W[~support] != 0).any()):
        raise FormatError(f"{form.name}: {int((W[~support] != 0).sum())} weights off the support are not zero.")
    if not isinstance(inner, Scaled):
        return form.encode(W, support)
    if isinstance(inner, Uneven | SuperBlock):  # no even spacing to find, but the largest weight has the largest code
        encoded = form.encode(W, support)
        check_decodes(encoded, W.double(), form)
        return encoded
    W = W.double()
    pooled = inner.layout.pooled(W if support is None else W.masked_fill(~support, math.nan))
    low = pooled.masked_fill(pooled.isnan(), math.inf).amin(-1)
    origin = low.masked_fill(low.isinf(), 0.0) if inner.offset == "minimum" else torch.zeros_like(low)
    scales = _spacing(pooled - origin[..., None], inner)
    zeros = None
    if inner.offset == "minimum":
        zeros = inner.stored(origin)
    elif inner.offset == "zero point":
        lowest = torch.where(scales > 0, (low / scales), 0.0).nan_to_num(0.0, 0.0, 0.0)
        zeros = inner.stored_zeros(-lowest.clamp(-inner.levels.high, 0.0))
    encoded = inner.quantized(W, inner.stored(scales), zeros, support)
    check_decodes(encoded, W, form)
    return encoded


def check_decodes(encoded: Encoded, W: Tensor, form: Format) -> None:
    """Refuse codes that do not stand for the weights in use ``W``, up to the rounding of their dtype.

    Raises:
        FormatError: With the largest difference.
    """
    difference = (form.decode(encoded).to(W) - W).abs()
    allowed = W.abs() * float(torch.finfo(torch.bfloat16).eps)
    inner = form.inner if isinstance(form, Masked) else form
    if isinstance(inner, Scaled) and encoded.scales is not None:
        allowed = allowed.maximum(_TOLERANCE * inner.layout.spread(encoded.scales.to(W).abs(), *W.shape))
    excess = difference - allowed
    if not bool((excess <= 1e-6 * W.abs().mean()).all()):
        at = int(excess.argmax())
        raise FormatError(
            f"The weights do not obey {form.name}: one of {float(W.flatten()[at]):.4g} would become "
            f"{float((form.decode(encoded)).flatten()[at]):.4g}. Name the format that they were written in, or dense."
        )


def _spacing(values: Tensor, form: Scaled) -> Tensor:
    """Return the largest spacing ``[rows, groups]`` of which all values ``[rows, groups, n]`` are allowed multiples."""
    size = values.abs().nan_to_num(0.0)
    most = max(abs(form.levels.low), abs(form.levels.high))
    smallest = size.masked_fill(size == 0, math.inf).amin(-1)  # rounding noise aside, a code of at least 1
    smallest = smallest.masked_fill(smallest.isinf(), 0.0)
    best, found = smallest, torch.zeros_like(smallest, dtype=torch.bool)
    for divisor in range(1, most + 1):
        spacing = smallest / divisor
        steps = torch.where(spacing[..., None] > 0, values / spacing[..., None].clamp_min(1e-300), 0.0).nan_to_num(0.0)
        near = (steps - steps.round()).abs().amax(-1) < _TOLERANCE
        fits = near & (steps.amax(-1) - steps.amin(-1) <= form.levels.high - form.levels.low + _TOLERANCE)
        best = torch.where(fits & ~found, spacing, best)
        found |= fits
    # The largest value tells the spacing most precisely.
    largest = size.amax(-1)
    steps = torch.where(best > 0, largest / best.clamp_min(1e-300), 1.0).round().clamp_min(1.0)
    return largest / steps
