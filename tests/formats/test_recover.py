from __future__ import annotations

import pytest
import torch

from peelwise.errors import FormatError
from peelwise.formats.recover import check_decodes, recover
from peelwise.formats.table import parse_format

NAMES = [
    "binary",
    "ternary",
    "ternary:group=16",
    "int2",
    "int3:group=16,minimum",
    "int4:affine",
    "int4:group=8",
    "int8",
]


def _obeying(name: str, *, d_in: int = 64) -> torch.Tensor:
    W = torch.randn(6, d_in, generator=torch.Generator().manual_seed(2)) * 0.1
    form = parse_format(name)
    # A scale that no rule of ours would choose.
    encoded = form.encode(W)
    return form.decode(form.quantized(W, (encoded.scales.float() * 0.83).to(encoded.scales), encoded.zeros))


@pytest.mark.parametrize("name", NAMES)
def test_codes_and_scales_are_found_from_the_values_alone(name: str) -> None:
    W, form = _obeying(name), parse_format(name)
    found = recover(W, form)
    torch.testing.assert_close(form.decode(found), W, rtol=2e-3, atol=1e-5)
    # Control: rounding by the format's own rule does not give these values, except where the range is the scale.
    if name.startswith("ternary"):
        assert (form.project(W) - W).abs().max() > 0.01


@pytest.mark.parametrize("name", ["binary", "ternary", "int2", "int4:affine", "int4:group=8"])
def test_values_rounded_to_bfloat16_are_still_read(name: str) -> None:
    W, form = _obeying(name), parse_format(name)
    found = recover(W.bfloat16().float(), form)
    torch.testing.assert_close(form.decode(found), W, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_do_not_obey_the_format_are_refused(name: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(FormatError, match="do not obey"):
        recover(torch.randn(6, 64), parse_format(name))
    W, form = _obeying(name), parse_format(name)
    encoded = recover(W, form)
    encoded.codes[3, 5] = -encoded.codes[3, 5] if name == "binary" else encoded.codes[3, 5] ^ 1
    with pytest.raises(FormatError, match="do not obey"):
        check_decodes(encoded, W, form)


def test_zero_and_constant_rows_are_read() -> None:
    W = torch.zeros(3, 16)
    W[1] = 0.25
    for name in ("ternary:channel", "int4", "int4:affine", "int4:minimum", "binary"):
        form = parse_format(name)
        torch.testing.assert_close(form.decode(recover(W, form)), W, rtol=1e-3, atol=0)


def test_weights_off_the_support_must_be_zero() -> None:
    form = parse_format("int4:blocks=2")
    W = form.project(torch.randn(4, 8))
    torch.testing.assert_close(form.decode(recover(W, form)), W, rtol=2e-3, atol=1e-6)
    W[0, 7] = 0.1
    with pytest.raises(FormatError, match="1 weights off the support"):
        recover(W, form)
