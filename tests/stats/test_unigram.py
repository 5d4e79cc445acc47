"""What counting tokens costs, against the same by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from peelwise.stats.unigram import _PSEUDO_COUNTS, unigram_loss


def slowly(fit, select, report, vocabulary):
    counts = Counter(fit)

    def loss(ids, pseudo):
        return sum(-math.log((counts[i] + pseudo) / (len(fit) + pseudo * vocabulary)) for i in ids) / len(ids)

    return loss(report, min(_PSEUDO_COUNTS, key=lambda pseudo: loss(select, pseudo)))


@pytest.mark.parametrize("vocabulary", [11, 500])
def test_is_the_same_by_hand(vocabulary):
    ids = torch.randint(11, (300,), generator=torch.Generator().manual_seed(0)) // 2
    parts = ids[:150], ids[150:200], ids[200:]
    assert unigram_loss(*parts, vocabulary) == pytest.approx(slowly(*(p.tolist() for p in parts), vocabulary))


def test_even_tokens_cost_the_logarithm_of_their_number_and_uneven_ones_less():
    even = torch.arange(8).repeat(50)
    assert unigram_loss(even, even, even, 8) == pytest.approx(math.log(8), abs=1e-6)
    uneven = torch.cat([torch.zeros(300, dtype=torch.int64), torch.arange(100) % 8])
    assert unigram_loss(uneven, uneven, uneven, 8) < 0.7 * math.log(8)


def test_a_token_that_fit_does_not_have_costs_a_finite_amount():
    assert math.isfinite(unigram_loss(torch.zeros(9, dtype=torch.int64), torch.tensor([0]), torch.tensor([3]), 4))
