import hashlib
import random
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from peelwise.errors import FewSequencesWarning, ProbeError
from peelwise.probe.limits import check_vocabulary
from peelwise.probe.probe import PARTS, Probe
from peelwise.probe.rows import Split


class Letters:
    """One id per character, with the calling convention of a Hugging Face tokenizer."""

    eos_token_id = 1
    bos_token_id = 2

    def __init__(self, *, opens: bool = False) -> None:
        self.opens = opens

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [3 + ord(letter) % 200 for letter in text]
        return {"input_ids": [self.bos_token_id, *ids] if self.opens and add_special_tokens else ids}


def random_stream(count, seed=0, vocabulary=1000):
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


def rows_of(split: Split):
    return [tuple(ids[mask].tolist()) for ids, mask in zip(split.ids, split.mask, strict=True)]


def all_rows(probe: Probe):
    return [row for part in PARTS for row in rows_of(getattr(probe, part))]


@pytest.fixture
def probe():
    return Probe.from_tokens(random_stream(40 * 17), sequence_length=16, seed=3, source="stream")


def test_stream_is_cut_into_sequences_that_do_not_overlap(probe):
    pieces = {tuple(piece.tolist()) for piece in random_stream(40 * 17).split(17)}

    assert set(all_rows(probe)) == pieces
    assert [getattr(probe, part).sequences for part in PARTS] == [20, 6, 14]
    assert probe.fit.inputs.shape == probe.fit.targets.shape == probe.fit.weights.shape == (20, 16)
    assert probe.fit.ids.dtype == torch.int64
    assert probe.fit.mask.dtype == torch.bool
    assert probe.fit.tokens == 20 * 16
    assert torch.equal(probe.fit.inputs[:, 1:], probe.fit.targets[:, :-1])


def test_tokens_limits_what_is_predicted_and_draws_from_everywhere():
    stream = torch.arange(100 * 11)
    probe = Probe.from_tokens(stream, sequence_length=10, tokens=405, seed=1)
    starts = [row[0] for row in all_rows(probe)]

    assert sum(getattr(probe, part).tokens for part in PARTS) == 400
    assert max(starts) > 50 * 11
    assert Probe.from_tokens(stream, sequence_length=10, tokens=None).record().fit_sequences == 50


def test_seed_decides_and_global_generators_are_left_alone():
    stream = random_stream(40 * 17)
    state, python_state = torch.random.get_rng_state(), random.getstate()
    first, again, other = (Probe.from_tokens(stream, sequence_length=16, seed=seed) for seed in (0, 0, 1))

    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    assert torch.equal(state, torch.random.get_rng_state())
    assert python_state == random.getstate()


def test_ragged_rows_are_padded_and_padding_weighs_nothing():
    rows = [list(range(start, start + 3 + start % 5)) for start in range(30)] + [[7]]
    probe = Probe.from_tokens(rows, tokens=None)

    assert sorted(all_rows(probe)) == sorted(map(tuple, rows[:-1]))  # a single id predicts nothing
    assert probe.report.ids.shape[1] == 7
    assert sum(getattr(probe, part).tokens for part in PARTS) == sum(len(row) - 1 for row in rows)


def test_equal_sequences_never_land_in_two_parts():
    rows = [[index % 30, 5, index % 30, 9] for index in range(300)]
    found = all_rows(Probe.from_tokens(torch.tensor(rows), tokens=None))
    assert len(found) == len(set(found)) == 30


def test_long_documents_are_not_crossed_and_short_ones_are_joined():
    long = ["a" * 10 + "b" * 10 + "c" * 7, "d" * 10 + "e" * 10 + "f" * 3]
    short = ["g" * 7, "h" * 7, "i" * 4, "j" * 7, "k" * 9]
    rows = _quiet(Probe.from_text, long + short, Letters(), sequence_length=9)
    letters = {"".join("." if token == 1 else chr(token - 3) for token in row) for row in all_rows(rows)}

    assert letters == {
        "a" * 10, "b" * 10, "d" * 10, "e" * 10, "ggggggg.hh", "hhhhh.iiii", ".jjjjjjj.k"
    }  # fmt: skip


def test_every_sequence_opens_as_the_tokenizer_would():
    probe = _quiet(Probe.from_text, _prose(60), Letters(opens=True), sequence_length=9, tokens=None)
    assert all(row[0] == 2 and 2 not in row[1:] and len(row) == 10 for row in all_rows(probe))
    assert probe.record().sequence_length == 9


def test_plain_encoders_will_do():
    class Bare:
        def encode(self, text):
            return [ord(letter) for letter in text]

    assert _quiet(Probe.from_text, _prose(60), Bare(), sequence_length=9).fit.tokens > 0


def test_dataset_rows_and_endless_streams():
    def endless():
        index = 0
        while True:
            yield {"text": None} if index % 7 == 0 else {"text": _prose(20, index)}
            index += 1

    probe = Probe.from_dataset(endless(), Letters(), tokens=400, sequence_length=9)
    assert sum(getattr(probe, part).tokens for part in PARTS) <= 400
    assert _quiet(Probe.from_dataset, [_prose(60)], Letters(), sequence_length=9).source == "dataset"
    with pytest.raises(ProbeError, match="Row 1 has no field 'text'; found 'body'"):
        Probe.from_dataset([{"text": "x"}, {"body": "y"}], Letters())


def test_fingerprint_is_the_documented_digest_and_ignores_what_padding_holds(probe):
    digest = hashlib.sha256()
    for part in PARTS:
        split = getattr(probe, part)
        digest.update(f"{part} {tuple(split.ids.shape)}\n".encode())
        digest.update(np.where(split.mask, split.ids, 0).astype("<i8").tobytes())
        digest.update(split.mask.numpy().astype("<i8").tobytes())
    assert probe.fingerprint == digest.hexdigest()

    ragged = _quiet(Probe.from_tokens, [[i, 1, 2, 3][: 3 + i % 2] for i in range(9)])
    filled = Split(ragged.fit.ids.masked_fill(~ragged.fit.mask, 5), ragged.fit.mask)
    assert Probe(filled, ragged.select, ragged.report, "x").fingerprint == ragged.fingerprint


def test_fingerprint_sees_one_id_and_the_part_it_lies_in(probe):
    ids = probe.fit.ids.clone()
    ids[3, 5] += 1
    assert Probe(Split(ids, probe.fit.mask), probe.select, probe.report, "x").fingerprint != probe.fingerprint
    assert Probe(probe.report, probe.select, probe.fit, "x").fingerprint != probe.fingerprint


def test_round_trip_through_a_file(tmp_path):
    probe = Probe.from_tokens([list(range(start, start + 3 + start % 5)) for start in range(40)], seed=4)
    save_file(probe.to_tensors(), tmp_path / "probe.safetensors")
    back = Probe.from_tensors(load_file(tmp_path / "probe.safetensors"), source="x", seed=4)

    assert back.fingerprint == probe.fingerprint
    assert torch.equal(back.report.weights, probe.report.weights)
    assert back.fit.ids.dtype == torch.int64


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.pop("select.lengths"),
        lambda t: t["fit.lengths"].fill_(10_000),
        lambda t: t["fit.ids"].fill_(-1),
        lambda t: t.update({"report.ids": t["report.ids"][:-1]}),
    ],
)
def test_damaged_tensors_are_refused(probe, spoil):
    tensors = probe.to_tensors()
    spoil(tensors)
    with pytest.raises(ProbeError, match="The stored probe"):
        Probe.from_tensors(tensors, source="x")


def test_record_and_device(probe):
    record = probe.record()
    assert (record.fit_tokens, record.report_sequences, record.sequence_length) == (320, 14, 16)
    assert record.fingerprint == probe.to("cpu").fingerprint
    assert probe.to("meta").fit.ids.device.type == "meta"


def test_vocabulary(probe):
    check_vocabulary(probe, 1000)
    with pytest.raises(ProbeError, match=r"must lie in 0\.\.499.* got \d+ in 'fit'"):
        check_vocabulary(probe, 500)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "The text is empty"),
        (["", " \n"], {}, "The text is empty"),
        ([], {}, "The text is empty"),
        (["fine", 3], {}, "Document 1: expected text, got int"),
        ("short", {}, "too short: length 128 needs 129 tokens, got 5"),
        ("x" * 500, {"sequence_length": 9}, "gives 1 different sequences, expected at least 5"),
        ("many letters differ", {"sequence_length": 0}, "sequence length must be at least 1"),
        ("many letters differ", {"tokens": 0}, "number of tokens must be positive"),
    ],
)
def test_unusable_text(text, options, message):
    with pytest.raises(ProbeError, match=message):
        Probe.from_text(text, Letters(), **options)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([[1.5, 2.0], [1.0, 3.0]], {}, "Sequence 0: expected integer token ids, got torch.float32"),
        ([[1, 2], [3, -100]], {}, "Sequence 1: token ids cannot be negative, got -100"),
        ([["a", "b"]], {}, "Sequence 0: expected a list of integer token ids"),
        (torch.zeros(2, 3, 4, dtype=torch.long), {}, "one or two dimensions"),
        ([], {}, "too few"),
        ([[1], [2]], {}, "too few"),
        (range(1000), {"tokens": 300}, "tokens=300 leaves 2 sequences, expected at least 5"),
        (range(20 * 129), {"shares": (0.01, 0.5, 0.5)}, "leave 0 to fit on"),
        (range(20 * 129), {"shares": (0.5, 0.5)}, "three positive shares"),
    ],
)
def test_unusable_tokens(tokens, options, message):
    with pytest.raises(ProbeError, match=message):
        Probe.from_tokens(tokens, **options)


def test_five_sequences_are_enough_but_warned_of():
    with pytest.warns(FewSequencesWarning, match="Only 2 sequences to report on"):
        probe = Probe.from_tokens(range(5 * 11), sequence_length=10)
    assert [getattr(probe, part).sequences for part in PARTS] == [2, 1, 2]


def _prose(words, seed=0):
    letters = random_stream(words * 5, seed, 26).tolist()
    return "".join(chr(97 + letter) for letter in letters)


def _quiet(build, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewSequencesWarning)
        return build(*arguments, **options)


class Counting(Letters):
    """Counts the characters that are tokenised."""

    def __init__(self):
        super().__init__()
        self.characters = 0

    def __call__(self, text, **options):
        self.characters += len(text)
        return super().__call__(text, **options)


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr("peelwise.probe.sequences.WHOLE_CHARACTERS", 50_000)


def _placed(count):
    """Return a text that says every nine letters where it is."""
    return " ".join(f"{number:08d}" for number in range(count))


def test_of_a_large_text_no_more_is_tokenised_than_is_needed(small_limit):
    tokenizer, text = Counting(), _placed(300_000)
    probe = Probe.from_text(text, tokenizer, tokens=2_000, sequence_length=32)
    assert tokenizer.characters < 80_000
    assert sum(getattr(probe, part).tokens for part in PARTS) == 62 * 32
    found = ["".join(chr(token - 3) for token in row) for row in all_rows(probe)]
    assert all(row in text for row in found)
    at = sorted(int(word) for row in found for word in row.split(" ") if len(word) == 8)
    assert at[0] < 30_000
    assert at[-1] > 270_000
    assert len({number // 3000 for number in at}) > 20  # from many places


def test_the_same_seed_draws_the_same_from_a_large_text(small_limit):
    draws = [Probe.from_text(_placed(30_000), Letters(), sequence_length=32, seed=seed) for seed in (1, 1, 2)]
    assert draws[0].fingerprint == draws[1].fingerprint
    assert draws[0].fingerprint != draws[2].fingerprint


def test_large_sets_of_short_documents_are_sampled_too(small_limit):
    tokenizer, documents = Counting(), [f"{number:08d}" * (1 + number % 9) for number in range(30_000)]
    probe = Probe.from_text(documents, tokenizer, tokens=2_000, sequence_length=32)
    assert tokenizer.characters < 80_000
    assert sum(getattr(probe, part).tokens for part in PARTS) == 62 * 32


def test_all_tokens_of_a_large_text_are_taken_when_asked_for(small_limit):
    tokenizer = Counting()
    probe = Probe.from_text(_placed(10_000), tokenizer, tokens=None, sequence_length=32)
    assert tokenizer.characters >= 9 * 10_000 - 1
    assert sum(getattr(probe, part).sequences for part in PARTS) == (9 * 10_000 - 1) // 33


def test_small_texts_are_drawn_from_as_ever():
    """The same text and seed give the same probe, in every version: certificates are compared by it."""
    text = _placed(3_000)
    assert _quiet(Probe.from_text, text, Letters(), tokens=2_000, seed=7).fingerprint[:16] == "4085db9f9a656a3a"


def test_half_a_surrogate_pair_is_told():
    with pytest.raises(ProbeError, match=r"Document 1: U\+D800 at character 2 is half"):
        Probe.from_text(["fine", "no\ud800"], Letters())
    with pytest.raises(ProbeError, match=r"Row 0: U\+D800"):
        Probe.from_dataset(["no\ud800"], Letters())
