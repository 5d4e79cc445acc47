"""Formats whose codes are not evenly spaced, and those whose scales are codes themselves."""

from __future__ import annotations

import itertools

import pytest
import torch

from peelwise.errors import FormatError
from peelwise.formats import parse_format
from peelwise.formats.base import Encoded
from peelwise.formats.membership import check_member
from peelwise.formats.recover import recover
from peelwise.formats.signals import measure
from peelwise.formats.superblock import TYPES, factored
from peelwise.formats.uneven import UNEVEN, table_of
from peelwise.references.coded import Metric, flipped, next_level
from peelwise.references.quantized import quadratic, solve

NAMES = ["nf4", "nf4:group=16,scale=float32", "fp4:channel", "float8_e4m3:block=4", "float8_e5m2:tensor", *TYPES]


def _matrix(d_out: int = 8, d_in: int = 512) -> torch.Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(3)) * 0.1


@pytest.mark.parametrize("name", NAMES)
def test_what_is_encoded_is_found_again_and_is_the_nearest_code(name: str) -> None:
    form, W = parse_format(name), _matrix()
    encoded = form.encode(W)
    check_member(encoded, form, (8, 512))
    decoded = form.decode(encoded)
    assert torch.equal(form.decode(form.quantized(decoded, encoded.scales, encoded.zeros)), decoded)
    for sign in (-1.0, 1.0):  # no neighbour of any code is nearer
        other = form.levels.moved(encoded.codes.float(), torch.full_like(W, sign)).to(encoded.codes.dtype)
        there = form.decode(Encoded(other, encoded.scales, encoded.zeros))
        assert ((decoded - W).abs() <= (there - W).abs() + 1e-7).all()


@pytest.mark.parametrize("name", UNEVEN)
def test_tables_are_those_of_the_dtypes_and_of_bitsandbytes(name: str) -> None:
    table = table_of(name)
    assert list(table.values) == sorted(set(table.values))
    if name.startswith("float8"):
        dtype = torch.float8_e4m3fn if "e4m3" in name else torch.float8_e5m2
        x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 20
        away = x.to(dtype).float()  # ties go to even there, so only the distance is compared
        torch.testing.assert_close((table.nearest(x) - x).abs(), (away - x).abs(), rtol=0, atol=0)
        assert table.high == torch.finfo(dtype).max
    else:
        assert table.count == (16 if name == "nf4" else 15)
        assert table.high == 1


def test_scales_of_a_square_block_belong_to_its_rows_and_columns() -> None:
    form, W = parse_format("int8:block=4,scale=float32"), _matrix(8, 12)
    encoded = form.encode(W)
    assert encoded.scales.shape == (2, 3)
    for i, j in itertools.product(range(2), range(3)):
        part = W[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
        expected = torch.maximum(part.max() / 127, part.min() / -128)
        torch.testing.assert_close(encoded.scales[i, j], expected)
    assert form.bits(8, 12) == 8 * 96 + 6 * 32
    with pytest.raises(FormatError, match=r"block=4 does not divide the 6 outputs .* such as 3"):
        form.encode(_matrix(6, 12))
    with pytest.raises(FormatError, match=r"block=5 does not divide the 12 inputs"):
        parse_format("int8:block=5").encode(_matrix(10, 12))


@pytest.mark.parametrize("name", ["float8_e4m3:block=4", "nf4:group=16", "int3:block=4", "q4_k", "q3_k"])
def test_descent_lowers_the_error_and_stays_in_the_format(name: str) -> None:
    d_in = 256 if "_k" in name else 32
    form, T = parse_format(name), _matrix(8, d_in)
    X = torch.randn(4 * d_in, d_in, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    X = X @ torch.randn(d_in, d_in, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    S = X.T @ X / len(X)
    found = solve(S, T, form)
    check_member(found.encoded, form, (8, d_in))
    there = float(quadratic(S, form.decode(found.encoded).to(S) - T.to(S)).sum())
    assert there == pytest.approx(found.achieved, rel=1e-6)
    assert found.achieved < 0.9 * found.rounded


@pytest.mark.parametrize("type_", TYPES)
def test_scales_in_use_of_a_super_block_stay(type_: str) -> None:
    form, T = parse_format(type_), _matrix(4, 256)
    used = form.encode(T * 1.2)
    X = torch.randn(600, 256, generator=torch.Generator().manual_seed(1)).double()
    found = solve(X.T @ X, T, form, starts=[used]).encoded
    rule = form.encode(T)
    for row in range(4):  # a row has all of its scales from one of the two places, and no others
        assert torch.equal(found.scales[row], used.scales[row]) or torch.equal(found.scales[row], rule.scales[row])


@pytest.mark.parametrize("type_", TYPES)
def test_bits_of_super_blocks_are_those_of_a_file(type_: str) -> None:
    bits = {"q2_k": 84, "q3_k": 110, "q4_k": 144, "q5_k": 176, "q6_k": 210}
    assert parse_format(type_).bits_per_weight(4, 512) == pytest.approx(8 * bits[type_] / 256)
    with pytest.raises(FormatError, match="super-blocks of 256"):
        parse_format(type_).encode(_matrix(4, 96))


def test_products_are_taken_apart_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    D = torch.randn(50, 1, generator=generator).to(torch.float16)
    for bits, signed in ((4, False), (6, False), (6, True), (8, True)):
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
        a = torch.randint(low, high, (50, 16), generator=generator)
        factor, found = factored(D.float() * a, bits, signed=signed)
        assert torch.equal(factor.float() * found, D.float() * a)
    assert not factored(torch.zeros(2, 8), 6, signed=False)[1].any()


def test_single_codes_move_to_their_neighbours_in_the_table() -> None:
    form, W = parse_format("nf4:channel,scale=float32"), _matrix(4, 16)
    encoded = form.encode(W)
    change = next_level(form, encoded, torch.ones(4, 16))
    values = torch.tensor(table_of("nf4").values)
    at = torch.searchsorted(values, encoded.codes)
    expected = (values[(at + 1).clamp(max=15)] - encoded.codes) * encoded.scales
    torch.testing.assert_close(change, expected)
    S = torch.eye(16)
    better = flipped(Metric(S), (_matrix(4, 16) * 1.3) - form.decode(encoded), form, encoded)
    check_member(better, form, (4, 16))
    errors = [float((form.decode(each) - W * 1.3).square().sum()) for each in (better, encoded)]
    assert errors[0] < errors[1]


def test_codes_of_a_table_are_checked_and_measured() -> None:
    form, W = parse_format("nf4:group=16"), _matrix(4, 32)
    encoded = form.encode(W)
    wrong = Encoded(encoded.codes.clone(), encoded.scales)
    wrong.codes[0, 0] = 0.5
    with pytest.raises(FormatError, match=r"code 0.5 is none of its 16 codes from -1 to 1"):
        check_member(wrong, form, (4, 32))
    with pytest.raises(FormatError, match=r"expected codes .* in int8"):
        check_member(Encoded(encoded.codes.to(torch.int8), encoded.scales), form, (4, 32))
    assert measure(form, form.decode(encoded), encoded, encoded).flipped == 0
    halfway = (encoded.codes.new_tensor(table_of("nf4").values)[3:5].mean() * encoded.scales.float()).repeat_interleave(
        16, 1
    )
    assert measure(form, halfway, encoded).near_threshold == 1


def test_plain_weights_of_such_formats_are_recognised() -> None:
    for name in ("nf4:group=16,scale=float32", "float8_e4m3:channel,scale=float32", "q4_k"):
        form = parse_format(name)
        W = form.project(_matrix(4, 256))
        torch.testing.assert_close(form.decode(recover(W, form)), W, rtol=1e-6, atol=0)
    with pytest.raises(FormatError, match="do not obey nf4"):
        recover(_matrix(4, 32), parse_format("nf4:group=16"))
