import pytest
import torch
from torch.testing import assert_close

from peelwise.errors import TooFewSamplesError
from peelwise.stats.gram import CrossSum, GramSum, RegressionSum, symmetric_product, with_ones
from planted import normal

CUTS = {"whole": [40], "two batches": [25, 15], "one row each": [1] * 40, "with an empty batch": [0, 40, 0]}


def token_by_token(g, x):
    """The mean outer product, one token at a time in float64."""
    total = torch.zeros(g.shape[1], x.shape[1], dtype=torch.float64)
    for left, right in zip(g.double(), x.double(), strict=True):
        total += torch.outer(left, right)
    return total / len(x)


@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_streamed_sums_are_the_means_taken_token_by_token(sizes, dtype, tolerance):
    x, g = normal(40, 7, dtype=dtype), normal(40, 5, seed=1, dtype=dtype)
    gram, cross = GramSum(), CrossSum()
    for rows, gradients in zip(x.split(sizes), g.split(sizes), strict=True):
        gram.update(rows)
        cross.update(gradients, rows)

    assert gram.n == cross.n == 40
    assert gram.mean().dtype == cross.mean().dtype == torch.float64
    assert_close(gram.mean(), token_by_token(x, x), rtol=0, atol=tolerance)
    assert_close(cross.mean(), token_by_token(g, x), rtol=0, atol=tolerance)


def test_merged_sums_are_the_whole_and_leave_the_other_sum_alone():
    x, g = normal(40, 7), normal(40, 5, seed=1)
    gram, cross = GramSum(), CrossSum()  # they start empty: the first merge must copy
    others = []
    for rows, gradients in zip(x.split(16), g.split(16), strict=True):
        part = GramSum(), CrossSum()
        part[0].update(rows)
        part[1].update(gradients, rows)
        gram.merge(part[0])
        cross.merge(part[1])
        others.append((part, rows, gradients))
    gram.merge(GramSum())
    cross.merge(CrossSum())

    assert_close(gram.mean(), token_by_token(x, x))
    assert_close(cross.mean(), token_by_token(g, x))
    for (other_gram, other_cross), rows, gradients in others:
        assert_close(other_gram.mean(), token_by_token(rows, rows))
        assert_close(other_cross.mean(), token_by_token(gradients, rows))


def test_many_small_batches_lose_nothing_to_float32():
    rows = torch.full((10, 1), 1e-4)
    total, in_float32 = GramSum(), torch.full((1, 1), 1.0)
    total.update(torch.ones(1, 1))
    for _ in range(100):
        total.update(rows)
        in_float32 += rows.T @ rows

    truth = 1 + 1000 * float(torch.tensor(1e-4)) ** 2
    assert float(total.mean() * total.n) == pytest.approx(truth, rel=1e-10)
    assert float(in_float32) != pytest.approx(truth, rel=1e-6)  # the control: the same sum kept in float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_multiplied_in_float32(dtype):
    x = 3 * normal(24, 48, dtype=dtype)  # fewer rows than columns: eigenvalues at zero that rounding can push below
    exact = x.double().T @ x.double()
    rounding = 1e-6 * float(exact.diagonal().mean())

    product = symmetric_product(x)
    assert product.dtype == torch.float32
    assert_close(product.double(), exact, rtol=0, atol=rounding)
    assert float(torch.linalg.eigvalsh(product.double())[0]) > -10 * rounding

    in_half = (x.T @ x).double()  # the control: a product in the inputs' own precision
    assert float(torch.linalg.eigvalsh(in_half)[0]) < -100 * rounding


@pytest.mark.parametrize("width", [1, 5, 127, 128, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_symmetric_product_is_the_whole_product_and_symmetric_to_the_bit(width, dtype):
    x = normal(300, width, dtype=dtype)
    product = symmetric_product(x)

    # How many sums a processor's kernels keep apart differs, and so does the rounding of float32.
    rtol, atol = (4e-6, 4e-4) if dtype == torch.float32 else (0, 1e-11)
    assert_close(product.double(), x.double().T @ x.double(), rtol=rtol, atol=atol)
    assert torch.equal(product, product.T)
    assert product.dtype == dtype


def test_a_column_of_ones_carries_sums_and_count():
    x = normal(30, 4)
    gram = GramSum()
    gram.update(with_ones(x))

    assert torch.equal(with_ones(x)[:, :4], x)
    assert_close(gram.mean()[4, :4], x.mean(0))
    assert float(gram.mean()[4, 4]) == 1
    assert with_ones(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS)
def test_streamed_and_merged_regression_sums_are_the_whole(sizes):
    x, y = normal(40, 7) + 1, normal(40, 5, seed=1) - 2
    streamed, merged = RegressionSum(), RegressionSum()
    for rows, targets in zip(x.split(sizes), y.split(sizes), strict=True):
        part = RegressionSum()
        part.update(rows, targets)
        streamed.update(rows, targets)
        merged.merge(part)

    for found in (streamed.sums(), merged.sums()):
        assert found.n == 40
        assert_close(found.xx, x.T @ x)
        assert_close(found.xy, x.T @ y)
        for total, expected in ((found.x, x), (found.y, y), (found.yy, y.square())):
            assert_close(total, expected.sum(0))
        assert_close(found.columns(1, 3).xy, (x.T @ y)[:, 1:3])
        assert_close(found.columns(1, 3).yy, y.square().sum(0)[1:3])


def test_regression_sums_are_frozen():
    total = RegressionSum()
    total.update(normal(4, 2), normal(4, 1))
    before = total.sums()
    kept = before.xx.clone()
    total.update(normal(4, 2, seed=1), normal(4, 1, seed=1))
    assert torch.equal(before.xx, kept)
    assert not torch.equal(total.sums().xx, kept)


def test_regression_sums_of_no_batch_are_refused_and_of_empty_ones_are_zero():
    with pytest.raises(TooFewSamplesError, match="at least one batch"):
        RegressionSum().sums()
    total = RegressionSum()
    total.update(torch.zeros(0, 3), torch.zeros(0, 2))
    assert (total.sums().n, tuple(total.sums().xy.shape), float(total.sums().xx.sum())) == (0, (3, 2), 0.0)


@pytest.mark.parametrize(
    "empty",
    [GramSum, CrossSum, lambda: _updated(GramSum(), 0), lambda: _updated(CrossSum(), 0)],
    ids=["gram", "cross", "gram, empty batch", "cross, empty batch"],
)
def test_a_mean_over_nothing_is_refused(empty):
    with pytest.raises(TooFewSamplesError, match="at least 1 token"):
        empty().mean()


def _updated(total, rows):
    total.update(*[torch.zeros(rows, 3)] * (2 if isinstance(total, CrossSum) else 1))
    return total
