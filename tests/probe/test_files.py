"""Files of any size: sampled from everywhere, the same for the same seed, and errors instead of hanging."""

import json
import os
import subprocess
import sys
import time
from collections import Counter

import pytest

from peelwise.errors import ProbeError
from peelwise.probe import files, texts
from peelwise.probe.files import Piece, decode_stretch, draw_blocks, lines, stretches
from peelwise.probe.texts import read_texts

SIZE = 3 * 2**20  # of a small file that counts as large here


@pytest.fixture
def small_limits(monkeypatch):
    """Let files of 1 MiB be large ones, of which 256 KiB are read."""
    for module in (files, texts):
        monkeypatch.setattr(module, "WHOLE_BYTES", 2**20)
        monkeypatch.setattr(module, "SAMPLE_BYTES", 2**18)


def numbered(size, word="naïve 日本 😀"):
    """Return lines that say where they are, about ``size`` bytes."""
    rows, length = [], 0
    while length < size:
        rows.append(f"{len(rows)} {word} {'x' * (len(rows) % 50)}")
        length += len(rows[-1].encode()) + 1
    return rows


def places(documents):
    return [int(line.split()[0]) for text in documents for line in text.splitlines()[1:-1]]


def test_small_files_are_read_whole_and_in_order(tmp_path, small_limits):
    rows = numbered(2**19)
    (tmp_path / "a.txt").write_text("\n".join(rows))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows[:99]))
    assert read_texts([tmp_path / "a.txt", tmp_path / "b.jsonl"], seed=5) == ["\n".join(rows), *rows[:99]]


def test_large_text_is_sampled_from_everywhere(tmp_path, small_limits):
    rows = numbered(SIZE)
    (tmp_path / "a.txt").write_text("\ufeff" + "\r\n".join(rows))
    found = read_texts([tmp_path / "a.txt"])

    assert 0.5 * 2**18 < sum(len(text.encode()) for text in found) <= 2**18
    assert len(found) == 2**18 // 2**16
    assert {line for text in found for line in text.splitlines()[1:-1]} <= set(rows)
    assert not any("\ufeff" in text or "\r" in text or "\ufffd" in text for text in found)
    found_at = places(found)
    assert found_at == sorted(found_at)
    assert len(found_at) == len(set(found_at))


def test_the_same_seed_reads_the_same_and_another_does_not(tmp_path, small_limits):
    (tmp_path / "a.txt").write_text("\n".join(numbered(SIZE)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in numbered(SIZE)))
    both = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    assert read_texts(both, seed=3) == read_texts(both, seed=3)
    assert read_texts(both, seed=3) != read_texts(both, seed=4)


def test_all_seeds_together_reach_every_part(tmp_path, small_limits):
    (tmp_path / "a.txt").write_text("\n".join(numbered(SIZE)))
    count = len(numbered(SIZE))
    tenths = Counter(
        10 * at // count for seed in range(30) for at in places(read_texts([tmp_path / "a.txt"], seed=seed))
    )
    assert set(tenths) == set(range(10))
    assert max(tenths.values()) < 4 * min(tenths.values())


def test_every_line_belongs_to_one_block(tmp_path):
    rows = numbered(10 * 2**16)
    rows[20] = "y" * (3 * 2**16)  # longer than two blocks
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(rows))
    blocks = range(-(-file.stat().st_size // 2**16))
    found = [piece.raw.decode().rstrip("\n") for block in blocks for piece in lines(file, [block])]
    assert found == rows
    assert b"".join(piece.raw for piece in stretches(file, blocks)) == file.read_bytes()


def test_letters_cut_by_a_block_are_left_out():
    raw = "日本語 text 😀".encode()
    for start in range(len(raw)):
        for end in range(start + 1, len(raw) + 1):
            text = decode_stretch(Piece(start, raw[start:end], start == 0, end == len(raw)), "a.txt")
            assert text in "日本語 text 😀"


def test_a_large_file_that_is_no_text_is_told(tmp_path, small_limits):
    (tmp_path / "a.txt").write_bytes(b"fine \xff\xfe" * SIZE)
    with pytest.raises(ProbeError, match=r"a\.txt is not UTF-8: byte 0xf[ef] at position \d+"):
        read_texts([tmp_path / "a.txt"])
    with (tmp_path / "b.txt").open("wb") as file:
        file.truncate(20 * 10**9)
    with pytest.raises(ProbeError, match=r"b\.txt holds only zero bytes at \d+"):
        read_texts([tmp_path / "b.txt"])
    os.rename(tmp_path / "b.txt", tmp_path / "b.jsonl")
    with pytest.raises(ProbeError, match=r"b\.jsonl: the line at byte \d+ is longer than"):
        read_texts([tmp_path / "b.jsonl"])


def test_bad_lines_of_large_files_are_named_by_byte(tmp_path, small_limits):
    (tmp_path / "a.jsonl").write_text('{"text": 3}\n' * (SIZE // 12))
    with pytest.raises(ProbeError, match=r"a\.jsonl, the line at byte \d+: the field 'text' should hold text, got int"):
        read_texts([tmp_path / "a.jsonl"])


def test_many_files_are_drawn_from_as_one(tmp_path, small_limits):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"{number} " * 30_000)
    paths = [tmp_path / f"{number}.txt" for number in range(40)]
    found = read_texts(paths)
    assert len(found) == 4
    assert read_texts([*paths, tmp_path / "0.txt"]) is not None
    assert sum(len(blocks) for blocks in draw_blocks([10**9, 10**9, 5], 0).values()) == 4


def test_large_parquet_is_sampled_by_groups_of_rows(tmp_path, small_limits):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = numbered(SIZE)
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=500)
    found = read_texts([tmp_path / "a.parquet"])
    at = [int(row.split()[0]) for row in found]
    assert 0 < sum(map(len, found)) < 2**19
    assert at == sorted(at)
    assert max(at) > len(rows) // 2
    assert found == read_texts([tmp_path / "a.parquet"])

    bomb = pa.table({"text": pa.array(["z" * 10_000] * 10_000).dictionary_encode()})
    pq.write_table(bomb, tmp_path / "bomb.parquet")
    with pytest.raises(ProbeError, match="holds more text than"):
        read_texts([tmp_path / "bomb.parquet"])
    # A column that is not read does not make a file large.
    pq.write_table(pa.table({"text": ["small"], "other": ["w" * SIZE]}), tmp_path / "c.parquet")
    assert read_texts([tmp_path / "c.parquet"]) == ["small"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("kind", ["pipe", "zero", "dangling", "circle"])
def test_special_files_are_told_at_once(tmp_path, name, kind):
    file = tmp_path / name
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to({"zero": "/dev/zero", "dangling": tmp_path / "nowhere", "circle": file}[kind])
    start = time.perf_counter()
    with pytest.raises(ProbeError, match=r"pipe or a device|not found|cannot be read"):
        read_texts([file])
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_names_that_cannot_be(name):
    with pytest.raises(ProbeError, match="cannot be read"):
        read_texts([name])


def test_endless_standard_input_ends(small_limits, monkeypatch):
    with open("/dev/zero", "rb") as endless:
        monkeypatch.setattr(sys, "stdin", type("Input", (), {"buffer": endless}))
        with pytest.raises(ProbeError, match="standard input goes on after 1048576 bytes"):
            read_texts(["-"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "a.jsonl:2: nested too deeply"),
        ('{"text": "x", "a": ' + '{"a":' * 100_000, "a.jsonl:2: nested too deeply"),
        ('{"text": "x", "n": ' + "9" * 10_000 + "}", "a.jsonl:2: Exceeds the limit"),
        ('{"text": "half \\ud83d of it"}', r"a.jsonl:2: U\+D83D at character 5 is half of a surrogate pair"),
        ('"\\udc00"', r"a.jsonl:2: U\+DC00 at character 0"),
    ],
)
def test_hostile_lines_name_file_and_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "fine \\ud83d\\ude00"}\n' + line + "\n")
    with pytest.raises(ProbeError, match=message):
        read_texts([tmp_path / "a.jsonl"])


@pytest.mark.slow
def test_300_megabytes_take_bounded_memory(tmp_path):
    """In a process of its own that may not have more."""
    line = "The quick brown fox jumps over the lazy dog, and number {} looks on from afar.\n"
    with (tmp_path / "large.txt").open("w") as file:
        for start in range(0, 4_000_000, 1000):
            file.write("".join(line.format(number) for number in range(start, start + 1000)))
    code = (
        "import resource, sys; from peelwise.probe.texts import read_texts\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = read_texts([sys.argv[1]])\n"
        "print(len(found), sum(map(len, found)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "large.txt")]
    count, characters, kilobytes = map(int, subprocess.check_output(run, text=True, env=os.environ).split())
    assert count == 256
    assert 15 * 2**20 < characters <= 16 * 2**20
    assert kilobytes < 120_000
