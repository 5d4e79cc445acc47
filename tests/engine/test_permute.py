"""Targets and stations of other sequences: every one gets another's, and never its padding."""

import pytest
import torch

from audits import runner_of, session_of, split_of
from peelwise.engine.permute import partner_order, shuffled_stations, shuffled_targets
from zoo import ZOO, sample_ids

LENGTHS = (9, 4, 6, 9, 3)
PADDING = 5  # what `split_of` fills up with


def test_shuffling_moves_every_sequence_and_never_padding():
    rows = [r[:n] for r, n in zip(sample_ids(5, 9).tolist(), LENGTHS, strict=True)]
    trace = runner_of(ZOO["llama"](), micro_batch_tokens=16).trace(split_of(rows))
    number = torch.arange(5.0)[:, None, None].expand(5, 8, 1)
    place = torch.arange(8.0)[None, :, None].expand(5, 8, 1)
    counts = [len(b.weights) for b in trace.batches]
    assert len(counts) > 1
    marked = list(torch.cat([number, place], dim=2).split(counts))
    moved = torch.cat(shuffled_stations(trace, 3)(marked))
    partner = moved[:, 0, 0].long()
    assert sorted(partner.tolist()) == [0, 1, 2, 3, 4]
    assert not bool((partner == torch.arange(5)).any())
    lengths = torch.tensor([len(r) - 1 for r in rows])
    assert bool((moved[..., 1] < lengths[partner][:, None]).all())
    assert all(bool((partner_order(n, s) != torch.arange(n)).all()) for n in (2, 3, 7) for s in range(5))


@pytest.mark.parametrize("shift_first", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_padding_of_a_shorter_partner_is_nobodys_target(seed, shift_first):
    rows = [(10 + r[:n] % 80).tolist() for r, n in zip(sample_ids(5, 9), LENGTHS, strict=True)]  # never PADDING
    trace = runner_of(ZOO["llama"](), micro_batch_tokens=16).trace(split_of(rows))
    look = shuffled_targets(trace, seed, shift_first=shift_first)
    partner = partner_order(5, seed, shift_first=shift_first)
    moved = [row[w] for place, b in enumerate(trace.batches) for row, w in zip(look(b, place), b.weights, strict=True)]
    for own, found, other in zip(rows, moved, partner.tolist(), strict=True):
        targets = rows[other][1:]
        assert found.tolist() == (targets + [targets[-1]] * 9)[: len(own) - 1]
        assert PADDING not in found.tolist()


@pytest.mark.parametrize("micro_batch_tokens", [1, 10_000])
def test_shuffled_targets_are_whole_sequences_of_others(micro_batch_tokens):
    session = session_of(ZOO["plain"](), micro_batch_tokens=micro_batch_tokens)
    look = shuffled_targets(session.fit, seed=0)
    moved = torch.cat([look(batch, position) for position, batch in enumerate(session.fit.batches)])
    own = session.probe.fit.targets
    assert not any(torch.equal(a, b) for a, b in zip(moved, own, strict=True))
    assert sorted(moved.tolist()) == sorted(own.tolist())


def test_shuffled_targets_change_with_the_seed_only():
    session = session_of(ZOO["plain"]())
    first, again, other = (shuffled_targets(session.fit, seed)(session.fit.batches[0], 0) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
