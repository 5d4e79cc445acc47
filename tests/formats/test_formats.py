from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from peelwise.errors import FormatError
from peelwise.formats.base import Encoded
from peelwise.formats.scaled import Levels, Scaled
from peelwise.formats.table import FAMILIES, parse_format

NAMES = [
    *("binary", "binary:tensor", "binary:group=4", "ternary", "ternary:channel,absmedian", "int2", "int3:group=4"),
    *("int4:affine", "int4:group=4,affine", "int5:minimum,scale=float32", "int6:tensor", "int7:affine", "int8:minimum"),
    *("binary:tensor,blocks=2", "int4:group=4,affine,keep=2:4", "int3:minimum,band=2", "ternary:blocks=2"),
]


def _matrix(d_out: int = 6, d_in: int = 12) -> Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(3)) * 0.1


def _slow_decode(name: str, encoded: Encoded) -> Tensor:
    """One weight at a time, in float64."""
    form = parse_format(name)
    inner = getattr(form, "inner", form)
    d_out, d_in = encoded.codes.shape
    out = torch.zeros(d_out, d_in, dtype=torch.float64)
    rows, groups = encoded.scales.shape
    for i, j in itertools.product(range(d_out), range(d_in)):
        if encoded.support is not None and not encoded.support[i, j]:
            continue
        where = (i if rows > 1 else 0, j * groups // d_in)
        q, s = float(encoded.codes[i, j]), float(encoded.scales[where])
        z = 0.0 if encoded.zeros is None else float(encoded.zeros[where])
        out[i, j] = s * q + z if inner.offset == "minimum" else s * (q - z)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_decode_is_what_one_weight_at_a_time_gives(name: str) -> None:
    form, W = parse_format(name), _matrix()
    encoded = form.encode(W)
    torch.testing.assert_close(form.decode(encoded).double(), _slow_decode(name, encoded), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(form.project(W), form.decode(encoded), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_encode_takes_the_nearest_level_at_its_scale(name: str) -> None:
    form, W = parse_format(name), _matrix()
    inner = getattr(form, "inner", form)
    encoded = form.encode(W)
    found = (form.decode(encoded) - W).abs()
    levels = range(inner.levels.low, inner.levels.high + 1, inner.levels.step)
    assert {int(code) for code in encoded.codes.unique()} <= set(levels)
    for code in levels:
        other = Encoded(torch.full_like(encoded.codes, code), encoded.scales, encoded.zeros, encoded.support)
        assert (found <= (form.decode(other) - W).abs() + 1e-7).all()


def test_scales_follow_the_rule_of_each_family() -> None:
    W = torch.tensor([[0.5, -1.0, 0.25, 3.0]])
    scale = {
        "binary": 1.1875,
        "ternary": 1.1875,
        "ternary:absmedian": 0.5,
        "int2": 3.0,
        "int4": 3.0 / 7,
        "int4:affine": 4.0 / 15,
        "int4:minimum": 4.0 / 15,
    }
    for name, expected in scale.items():
        encoded = parse_format(f"{name}{',' if ':' in name else ':'}scale=float32").encode(W)
        assert float(encoded.scales) == pytest.approx(expected), name
    assert int(parse_format("int4:affine").encode(W).zeros) == 4  # 1.0 / (4 / 15) = 3.75
    assert float(parse_format("int4:minimum").encode(W).zeros) == -1.0
    # Control: of an even number of weights the lower middle one is the median; where it is 0, the mean.
    assert float(parse_format("ternary:absmedian").encode(torch.tensor([[0.0, 0, 0, 2]])).scales) == 0.5


def test_binary_rounding_is_the_nearest_binary_matrix_with_its_best_scale() -> None:
    W = _matrix(3, 4).double()
    for name, rows in (("binary:scale=float32", 1), ("binary:tensor,scale=float32", 3)):
        parts = W.split(rows)
        best = 0.0
        for part in parts:
            signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=part.numel())), dtype=torch.float64)
            along = (signs @ part.flatten()).clamp_min(0) / part.numel()
            best += float((along[:, None] * signs - part.flatten()).square().sum(1).min())
        assert float((parse_format(name).project(W).double() - W).square().sum()) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("dense", 32 * 96),
        ("dense:bfloat16", 16 * 96),
        ("binary", 96 + 8 * 16),
        ("binary:tensor,scale=float32", 96 + 32),
        ("binary:model", 96),
        ("ternary", 96 * math.log2(3) + 16),
        ("int4:group=4", 4 * 96 + 24 * 16),
        ("int4:group=4,affine", 4 * 96 + 24 * (16 + 4)),
        ("int4:group=4,minimum", 4 * 96 + 24 * 32),
        ("int8:tensor", 8 * 96 + 16),
        ("binary:blocks=4", 24 + 8 * 16),
        ("int4:group=3,blocks=4", 4 * 24 + 8 * 16),  # three of four groups of a row are structural zeros
        ("dense:float16,blocks=4", 16 * 24),
        ("int2:keep=2:4", 2 * 48 + 8 * 16 + 24 * math.log2(6)),
    ],
)
def test_bits_are_counted_with_scales_and_without_structural_zeros(name: str, bits: float) -> None:
    form = parse_format(name)
    assert form.bits(8, 12) == pytest.approx(bits)
    assert form.bits_per_weight(8, 12) == pytest.approx(bits / 96)


@pytest.mark.parametrize("name", NAMES)
def test_names_can_be_read_again(name: str) -> None:
    form = parse_format(name)
    assert parse_format(form.name) == form
    assert str(form) == form.name


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_all_zero_and_constant_matrices_are_handled(name: str) -> None:
    W = torch.zeros(3, 256)
    assert (parse_format(name).project(W) == 0).all()
    W[1] = 0.5
    W[2] = -0.25
    for option in ("", ":channel,minimum", ":channel,affine") if name.startswith("int") else ("",):
        form = parse_format(name + option)
        if isinstance(form, Scaled) and form.layout.shared_by_rows:
            form = parse_format(name + ":channel")
        torch.testing.assert_close(form.project(W), W, rtol=1e-3, atol=1e-6)


def test_a_scale_of_zero_has_no_level_but_zero() -> None:
    form = parse_format("int4:affine")
    encoded = form.quantized(_matrix(), torch.zeros(6, 1), torch.full((6, 1), 3, dtype=torch.uint8))
    assert (form.decode(encoded) == 0).all()


def test_nearest_rounds_halves_up_and_clips() -> None:
    x = torch.tensor([-9.0, -0.5, 0.0, 0.49, 0.5, 9.0])
    assert Levels(-1, 1, 2).nearest(x).tolist() == [-1, -1, 1, 1, 1, 1]
    assert Levels(-1, 1).nearest(x).tolist() == [-1, 0, 0, 0, 1, 1]
    assert Levels(0, 3).nearest(x).tolist() == [0, 0, 0, 0, 1, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9", "expected one of dense, binary"),
        ("", "Unknown format"),
        ("int4:grup=64", "'grup=64' is not understood"),
        ("int4:group=", "'group=' is not understood"),
        ("int4:group=0", "positive group size"),
        ("int4:channel,tensor", "'tensor' contradicts"),
        ("binary:affine", "binary has no option 'kind'"),
        ("dense:channel", "dense has no option 'layout'"),
        ("int4:keep=2", "'keep=2' is not understood"),
        ("int4:keep=5:4", "1 <= N <= M"),
        ("int4:scale=float8", "'scale=float8' is not understood"),
        ("binary:blocks=2,band=3", "'band=3' contradicts"),
    ],
)
def test_misspelt_formats_are_refused(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_format(text)


@pytest.mark.parametrize(
    ("name", "W", "message"),
    [
        ("int4:group=5", _matrix(), "group=5 does not divide the 12 inputs .* such as 4"),
        ("binary:blocks=5", _matrix(), r"blocks=5 does not divide a matrix of \[6, 12\]"),
        ("int4:keep=2:5", _matrix(), "5 does not divide the 12 inputs"),
        ("binary:band=-1", _matrix(), "negative"),
        ("int4", torch.full((2, 2), math.nan), "NaN or Inf"),
        ("int4", torch.ones(3), "matrix"),
        ("dense", torch.ones(0, 3), "matrix"),
        ("binary", torch.full((2, 2), 1e6), "does not fit the dtype .* Use scale=float32"),
    ],
)
def test_matrices_that_do_not_go_with_the_format_are_refused(name: str, W: Tensor, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_format(name).encode(W)


def test_codes_of_another_format_are_refused() -> None:
    with pytest.raises(FormatError, match="another format"):
        parse_format("int4:affine").decode(parse_format("int4").encode(_matrix()))
