"""Rolling probes: another part each time, nothing fitted on is ever reported on, and random states stay as they are."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from peelwise.errors import ProbeError
from peelwise.probe.probe import Probe
from peelwise.probe.rolling import Roll, RollingProbe

LENGTH = 16


def stream(tokens=40_000, seed=0):
    return torch.randint(0, 50, (tokens,), generator=torch.Generator().manual_seed(seed))


def rolling(**options):
    return Probe.rolling(stream(), **{"tokens": 20_000, "each": 2_000, "sequence_length": LENGTH, **options})


def rows(split):
    return {tuple(row) for row in split.rows()}


def test_it_is_split_by_hashes_as_any_probe_and_keeps_a_part_for_the_loss():
    probe = rolling()
    other = Probe.from_tokens(stream(), tokens=20_000, sequence_length=LENGTH)
    assert isinstance(probe, RollingProbe)
    assert probe.fingerprint == other.fingerprint
    assert probe.split_faults() is None
    assert 900 < probe.fixed.tokens < 1_100
    assert rows(probe.fixed) <= rows(probe.report)


def test_parts_differ_and_no_sequence_is_ever_fitted_and_reported():
    probe = rolling()
    roll = Roll(probe)
    parts = [roll.take(2_000) for _ in range(20)]  # more than twice through the corpus
    fitted = set().union(*(rows(part.probe.fit) | rows(part.probe.select) for part in parts))
    reported = [rows(part.probe.report) for part in parts]
    assert not fitted & set().union(*reported)
    assert not rows(probe.fixed) & set().union(*reported)
    assert not reported[0] & reported[1]
    assert all(1_700 < p.probe.fit.tokens + p.probe.select.tokens + p.probe.report.tokens < 2_300 for p in parts)


def test_places_tell_which_earlier_parts_are_reported_on_again():
    roll = Roll(rolling())
    parts = [roll.take(2_000) for _ in range(20)]
    reported = [rows(part.probe.report) for part in parts]
    pairs = [(i, j) for j in range(20) for i in range(j)]
    said = [parts[j].repeats(parts[i].report) for i, j in pairs]
    assert said == [
        any(reported[j] & reported[k] for k in range(i, j)) or bool(reported[j] & reported[i]) for i, j in pairs
    ]
    assert any(said)
    assert not all(said)


def test_the_same_sizes_give_the_same_parts():
    one, other = Roll(rolling()), Roll(rolling())
    for size in (1_000, 1_000, 2_000):
        assert one.take(size).probe.fingerprint == other.take(size).probe.fingerprint


class Training:
    """A data set whose items are drawn with all three generators, as augmentation does."""

    def __init__(self, item):
        self.item, self.read = item, []

    def __len__(self):
        return 2_000

    def __getitem__(self, index):
        self.read.append(index)
        random.random()
        np.random.random()  # noqa: NPY002
        torch.rand(1)
        return self.item(index)


def ids_of(index):
    return torch.randint(0, 50, (LENGTH + 1,), generator=torch.Generator().manual_seed(index))


@pytest.mark.parametrize(
    "item",
    [
        ids_of,
        lambda i: ids_of(i).tolist(),
        lambda i: {"input_ids": ids_of(i), "labels": ids_of(i)},
        lambda i: {"input_ids": [*ids_of(i).tolist(), 0, 0], "attention_mask": [1] * (LENGTH + 1) + [0, 0]},
    ],
)
def test_a_data_set_is_read_by_index_and_random_states_stay(item):
    data = Training(item)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    probe = Probe.rolling(data, tokens=8_000, each=1_000, sequence_length=LENGTH)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert data.read != sorted(data.read)
    assert len(data.read) < 1_100  # twice what is asked for, not all
    assert rows(probe.fit) <= {tuple(ids_of(i).tolist()) for i in data.read}


def test_texts_of_a_data_set_are_read_with_a_tokenizer():
    class Bytes:
        def encode(self, text):
            return list(text.encode())

    class Texts:
        def __len__(self):
            return 400

        def __getitem__(self, index):
            letters = torch.randint(97, 122, (200,), generator=torch.Generator().manual_seed(index))
            return {"body": bytes(letters.tolist()).decode()}

    probe = Probe.rolling(Texts(), Bytes(), field="body", tokens=4_000, each=500, sequence_length=LENGTH)
    assert probe.fit.tokens + probe.select.tokens + probe.report.tokens > 3_000


def test_what_is_too_little_or_has_no_ids_is_refused():
    with pytest.raises(ProbeError, match="two measurements"):
        Probe.rolling(stream(400), tokens=400, sequence_length=LENGTH)
    with pytest.raises(ProbeError, match="input_ids"):
        Probe.rolling(Training(lambda i: {"text": "a"}), tokens=4_000, sequence_length=LENGTH)
    with pytest.raises(ProbeError, match="each=0"):
        rolling(each=0)
