from __future__ import annotations

import pytest
import torch

from peelwise.errors import FormatError
from peelwise.formats.masked import Banded, BlockDiagonal, Given, Masked, NOfM
from peelwise.formats.table import parse_format

W = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def test_patterns_are_those_that_their_names_say() -> None:
    blocks = BlockDiagonal(2).support(W)
    assert blocks[:2, :4].all()
    assert blocks[2:, 4:].all()
    assert int(blocks.sum()) == 16
    band = Banded(1).support(W)
    assert band.nonzero().tolist() == [
        [0, 0],
        [0, 1],
        *([i, j] for i in (1, 2, 3) for j in (2 * i - 1, 2 * i, 2 * i + 1)),
    ]
    kept = NOfM(2, 4).support(W).view(4, 2, 4)
    assert (kept.sum(2) == 2).all()
    size = W.abs().view(4, 2, 4)
    assert (size.masked_fill(~kept, 9).amin(2) >= size.masked_fill(kept, 0).amax(2)).all()


@pytest.mark.parametrize("inner", ["dense", "binary", "ternary:channel", "int4:affine", "int4:group=4,minimum"])
def test_weights_off_the_support_are_zero_and_do_not_touch_the_scales(inner: str) -> None:
    support = BlockDiagonal(2).support(W)
    form = Masked(parse_format(inner), Given(support))
    noisy = torch.where(support, W, 100.0)
    found = form.project(noisy)
    assert (found[~support] == 0).all()
    # The two blocks by themselves, where every row has the same scale as in the whole.
    parts = torch.block_diag(parse_format(inner).project(W[:2, :4]), parse_format(inner).project(W[2:, 4:]))
    torch.testing.assert_close(found, parts)


def test_an_empty_row_of_a_support_is_refused_by_number() -> None:
    support = torch.ones(4, 8, dtype=torch.bool)
    support[2] = False
    form = Masked(parse_format("binary"), Given(support))
    with pytest.raises(FormatError, match=r"row 2 has no weight \(1 empty rows of 4\)"):
        form.encode(W)
    with pytest.raises(FormatError, match=r"shape \(4, 9\)"):
        Masked(parse_format("binary"), Given(support)).encode(torch.ones(4, 9))
    with pytest.raises(FormatError, match="float32"):
        Masked(parse_format("binary"), Given(support.float())).encode(W)


def test_a_mask_of_a_mask_is_refused() -> None:
    with pytest.raises(FormatError, match="masked already"):
        Masked(parse_format("binary:blocks=2"), Banded(1))


def test_a_given_support_has_a_name_that_cannot_be_read_back() -> None:
    form = Masked(parse_format("binary"), Given(BlockDiagonal(2).support(W)))
    assert form.name == "binary:channel,support=given"
    with pytest.raises(FormatError, match="not understood"):
        parse_format(form.name)
