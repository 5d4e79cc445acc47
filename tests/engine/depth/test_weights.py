"""Signals of weights against slow and obvious computations in float64, each with a damage that it must see."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from peelwise.engine.depth import weights
from peelwise.engine.depth.weights import Gain, Matrix, Neurons

HEAD = 4


@pytest.fixture
def W() -> Tensor:  # noqa: N802 - a matrix
    return torch.randn(24, 16, generator=torch.Generator().manual_seed(3))


def slow_singular_values(W: Tensor) -> np.ndarray:
    return np.linalg.svd(W.double().numpy(), compute_uv=False)


def test_singular_values_and_ranks(W: Tensor) -> None:
    s = slow_singular_values(W)
    matrix = Matrix(W)
    assert matrix.singular_values.numpy() == pytest.approx(s, rel=1e-9)
    assert weights.stable_rank(matrix) == pytest.approx(float((s**2).sum() / s[0] ** 2))
    assert weights.effective_rank(matrix) == pytest.approx(math.exp(stats.entropy(s / s.sum())) / 16)
    assert weights.singular_tail(matrix) == pytest.approx(s[15] / s[8], rel=1e-4)
    assert weights.hill_alpha(matrix) == pytest.approx(1 + 8 / sum(math.log(s[i] ** 2 / s[8] ** 2) for i in range(8)))


def test_a_low_rank_is_seen_in_the_tail(W: Tensor) -> None:
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    low = Matrix((U[:, :10] * S[:10]) @ V[:10])
    healthy = weights.singular_tail(Matrix(W))
    found = weights.singular_tail(low)
    assert healthy is not None
    assert found is not None
    assert found < 0.01 * healthy
    assert weights.effective_rank(low) < weights.effective_rank(Matrix(W))  # type: ignore[operator]


def test_moments_and_dispersions(W: Tensor) -> None:
    w = W.double().numpy()
    matrix = Matrix(W)
    assert weights.weight_rms(matrix) == pytest.approx(math.sqrt((w**2).mean()))
    assert weights.weight_kurtosis(matrix) == pytest.approx(float(stats.kurtosis(w.ravel(), fisher=False)))
    rows = [math.log(math.sqrt(sum(x * x for x in row))) for row in w]
    columns = [math.log(math.sqrt(sum(x * x for x in column))) for column in w.T]
    assert weights.row_dispersion(matrix) == pytest.approx(np.std(rows, ddof=1))
    assert weights.column_dispersion(matrix) == pytest.approx(np.std(columns, ddof=1))
    above = sum(x > w.mean() + w.std(ddof=1) for x in w.ravel()) / w.size
    assert weights.large_weights(matrix) == pytest.approx(above)


def test_random_weights_have_no_trace_of_training_and_scaled_rows_have() -> None:
    random = torch.Generator().manual_seed(1)
    drawn = torch.randn(400, 300, generator=random)
    assert weights.trace_of_training(Matrix(drawn)) == pytest.approx(1, abs=0.1)
    trained = drawn * torch.rand(400, 1, generator=random).add(0.5) * torch.rand(1, 300, generator=random).add(0.5)
    found = weights.trace_of_training(Matrix(trained))
    rows, columns = (np.std(np.log(np.linalg.norm(trained.double().numpy(), axis=a)), ddof=1) for a in (1, 0))
    assert found == pytest.approx(math.sqrt(rows * math.sqrt(2 * 300) * columns * math.sqrt(2 * 400)), rel=1e-4)
    assert found > 4


def test_zero_rows_and_columns(W: Tensor) -> None:
    W[:, 3] = 0
    W[5] = 0
    assert weights.zero_share(Matrix(W)) == pytest.approx(2 / 40)
    assert weights.zero_share(Matrix(W + 1)) == 0


@pytest.mark.parametrize("heads_last", [False, True])
def test_heads(W: Tensor, heads_last: bool) -> None:
    W = W.T.contiguous() if heads_last else W  # heads are always along the axis of 24
    by_head = [W[:, h * HEAD : (h + 1) * HEAD] if heads_last else W[h * HEAD : (h + 1) * HEAD] for h in range(6)]
    energies = [float(each.double().square().sum()) for each in by_head]
    matrix = Matrix(W, HEAD, heads_last)
    assert weights.smallest_head_share(matrix) == pytest.approx(6 * min(energies) / sum(energies), rel=1e-5)
    assert weights.largest_head_share(matrix) == pytest.approx(6 * max(energies) / sum(energies), rel=1e-5)
    cosines = [
        float(a.flatten() @ b.flatten() / a.norm() / b.norm())
        for i, a in enumerate(by_head)
        for j, b in enumerate(by_head)
        if i < j
    ]
    assert weights.head_similarity(matrix) == pytest.approx(max(cosines), abs=1e-5)
    by_head[1].copy_(by_head[0])
    assert weights.head_similarity(matrix) == pytest.approx(1, abs=1e-5)
    by_head[2].zero_()
    assert weights.smallest_head_share(matrix) == 0
    assert weights.smallest_head_share(Matrix(W)) is None


def test_neurons_that_grew_together_are_paired_until_one_side_is_permuted() -> None:
    random = torch.Generator().manual_seed(5)
    size = torch.rand(64, generator=random) + 0.2
    up, gate = (torch.randn(64, 16, generator=random) * size[:, None] for _ in range(2))
    down = torch.randn(16, 64, generator=random) * size
    for W in (up, gate):
        expected = float(np.corrcoef(np.log(W.norm(dim=1).numpy()), np.log(down.norm(dim=0).numpy()))[0, 1])
        assert weights.neuron_mismatch(Neurons(W, down)) == pytest.approx(1 - expected, abs=1e-5)
        assert expected > 0.7
        permuted = weights.neuron_mismatch(Neurons(W[torch.randperm(64, generator=random)], down))
        assert permuted is not None
        assert permuted > 0.7


def test_gains() -> None:
    gain = torch.tensor([1.0, -2.0, 0.5, 0.0])
    assert weights.gain_rms(Gain(gain)) == pytest.approx(math.sqrt((1 + 4 + 0.25) / 4))
    assert weights.gain_dispersion(Gain(gain)) == pytest.approx(np.std(np.log([1, 2, 0.5]), ddof=1))


def test_channels_that_are_mixed_up_and_copies_are_seen_among_their_kin() -> None:
    random = torch.Generator().manual_seed(7)
    channels = torch.rand(32, generator=random) + 0.1
    writers = [torch.randn(32, 48, generator=random) * channels[:, None] for _ in range(6)]
    made = [weights.sketch(Matrix(W, writes=True), 32) for W in writers]
    profiles = [np.log(W.norm(dim=1).double().numpy()) for W in writers]
    expected = np.corrcoef(profiles[2], np.median([profiles[i] for i in (0, 1, 3, 4, 5)], axis=0))[0, 1]
    # torch's median of an even number is the lower of the two in the middle; of five there is one
    assert weights.stream_mismatch(made)[2] == pytest.approx(max(1 - expected, 0.02), abs=1e-6)
    writers[2] = writers[2][torch.randperm(32, generator=random)]
    writers[4] = writers[0]
    made = [weights.sketch(Matrix(W, writes=True), 32) for W in writers]
    found = weights.stream_mismatch(made)
    assert max(range(6), key=lambda i: found[i] or 0) == 2
    similar = weights.copy_similarity(made)
    assert [i for i, value in enumerate(similar) if value is not None and value > 0.99] == [0, 4]
    assert max(similar[i] or 0 for i in (1, 2, 3, 5)) < 0.6


def test_rows_in_another_rotary_layout_are_seen_within_heads() -> None:
    random = torch.Generator().manual_seed(9)
    frequencies = torch.linspace(0.2, 2, 8).repeat(2)  # a head of 16: both halves of a pair alike
    queries = [torch.randn(64, 32, generator=random) * frequencies.repeat(4)[:, None] for _ in range(6)]
    queries[3] = queries[3].unflatten(0, (-1, 2, 8)).transpose(1, 2).reshape(64, 32)
    found = weights.head_mismatch([weights.sketch(Matrix(W, 16), 32) for W in queries])
    assert found[3] is not None
    assert found[3] > 0.4 > max(value or 0 for i, value in enumerate(found) if i != 3)
