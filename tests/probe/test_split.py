"""Sequences go where the hash of their content says, and whoever chose them himself is told apart."""

from __future__ import annotations

import random

import pytest

from peelwise.probe.overlap import Seen, shingles
from peelwise.probe.probe import SHARES, Probe
from peelwise.probe.split import PARTS, Pool, draw_parts, key_of, pool_hash, split_faults

SEED = 5


def rows_of(count, length=17, seed=0):
    source = random.Random(seed)
    return [[source.randrange(500) for _ in range(length)] for _ in range(count)]


def drawn(rows, documents=None, tokens=None):
    return draw_parts(rows, documents, tokens, SHARES, SEED)


@pytest.mark.parametrize("tokens", [None, 640])
def test_the_order_of_the_text_makes_no_difference(tokens):
    rows = rows_of(100)
    one, other = drawn(rows, tokens=tokens), drawn(rows[::-1], tokens=tokens)
    assert one == other
    assert [len(part) for part in one.parts] == ([50, 15, 35] if tokens is None else [20, 6, 14])
    assert one.pool == Pool(100, pool_hash(rows))
    keys = [key_of(row, SEED) for part in one.parts for row in part]
    assert keys == sorted(key_of(row, SEED) for row in rows)[: len(keys)]
    assert split_faults(one.parts, None, one.pool, SEED) is None
    assert draw_parts(rows, None, tokens, SHARES, SEED + 1).parts != one.parts


def test_a_document_goes_to_one_part():
    rows = rows_of(200)
    documents = [place // 4 for place in range(200)]
    found = drawn(rows, documents, tokens=100 * 16)
    sets = [set(part) for part in found.documents]
    assert not (sets[0] & sets[1])
    assert not (sets[0] & sets[2])
    assert not (sets[1] & sets[2])
    assert found.pool.documents == len(set().union(*sets)) >= 20
    assert [len(part) for part in found.parts] == pytest.approx([50, 15, 35], abs=3)
    assert split_faults(found.parts, found.documents, found.pool, SEED) is None
    moved = (found.documents[0], [found.documents[0][0], *found.documents[1][1:]], found.documents[2])
    assert "two parts" in split_faults(found.parts, moved, found.pool, SEED)


def test_few_documents_are_split_by_sequence():
    found = drawn(rows_of(100), [place // 50 for place in range(100)])
    assert found.documents is None
    assert found.pool.documents is None


def test_near_duplicates_are_drawn_once():
    rows = rows_of(60)
    shifted = [[*row[3:], 7, 8, 9] for row in rows[:10]]
    found = drawn(rows + shifted)
    assert sum(map(len, found.parts)) == 60
    assert found.pool.sequences == 70
    assert found.pool.left_out <= 10
    assert Seen(rows[:1]).share(shifted[0]) > 0.5 > Seen(rows[1:]).share(rows[0])
    assert len(shingles(rows[0])) == 10
    assert split_faults(found.parts, None, found.pool, SEED) is None


def test_the_best_few_of_many_cannot_be_named_the_first():
    rows = rows_of(1_008)
    chosen = sorted(random.Random(1).sample(rows, 24), key=lambda row: key_of(row, SEED))
    parts = chosen[:12], chosen[12:16], chosen[16:]
    assert "not the first 24 of 1008" in split_faults(parts, None, Pool(1_008, pool_hash(rows)), SEED)
    # Said to be all that there was, it is a choice of text, and the size of the pool says so.
    assert split_faults(parts, None, Pool(24, pool_hash(chosen)), SEED) is None
    first = drawn(rows, tokens=24 * 16)
    assert split_faults(first.parts, None, first.pool, SEED) is None


def test_a_probe_of_many_documents_keeps_them_through_its_file():
    class Words:
        def encode(self, text):
            return [int(word[2:8]) % 1_000 for word in text.split()]

    source = random.Random(2)
    texts = [" ".join(f"{source.random():.6f}" for _ in range(60)) for _ in range(80)]
    probe = Probe.from_text(texts, Words(), tokens=None, sequence_length=16)
    assert probe.pool.documents == 80
    back = Probe.from_tensors(probe.to_tensors(), source="text", pool=probe.pool)
    assert back.fingerprint == probe.fingerprint
    assert back.record() == probe.record()
    assert back.split_faults() is None
    assert {len(probe.documents[part]) for part in PARTS} == {getattr(probe, part).sequences for part in PARTS}
