import io
import sys
from types import SimpleNamespace

import pytest

from peelwise.errors import MissingExtraError, ProbeError
from peelwise.probe.texts import read_texts, reference_prose


def test_plain_text_jsonl_and_parquet_come_back_in_order(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (tmp_path / "a.md").write_text("# heading\nplain", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two\u2028lines"}\n', encoding="utf-8")
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["three", None, "four"]}), tmp_path / "c.parquet")

    texts = read_texts([tmp_path / "a.md", str(tmp_path / "b.jsonl"), tmp_path / "c.parquet"])

    assert texts == ["# heading\nplain", "one", "two\u2028lines", "three", "four"]


def test_another_field_can_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": null}', encoding="utf-8")
    assert read_texts([tmp_path / "a.jsonl"], field="body") == ["x"]


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("naïve\r\n".encode())))
    assert read_texts(["-"]) == ["naïve\n"]


def test_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_texts([tmp_path / "a.txt"]) == ["hello"]


def test_wrong_encoding_names_file_and_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9 au lait")
    with pytest.raises(ProbeError, match=r"a\.txt is not UTF-8: byte 0xe9 at position 6"):
        read_texts([tmp_path / "a.txt"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"a\.jsonl:2: not valid JSON at column 10"),
        ("[1, 2]", r"a\.jsonl:2: expected an object with the field 'text', got list"),
        ('{"body": "x", "id": 1}', r"a\.jsonl:2 has no field 'text'; found 'body', 'id'"),
        ('{"text": 3}', r"a\.jsonl:2: the field 'text' should hold text, got int"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ProbeError, match=message):
        read_texts([tmp_path / "a.jsonl"])


def test_parquet_errors_name_what_is_there(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["x"], "text": [1]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but no more")

    with pytest.raises(ProbeError, match="no column 'prose'; found 'body', 'text'"):
        read_texts([tmp_path / "a.parquet"], field="prose")
    with pytest.raises(ProbeError, match="should hold text, got int"):
        read_texts([tmp_path / "a.parquet"])
    with pytest.raises(ProbeError, match=r"b\.parquet is not a readable"):
        read_texts([tmp_path / "b.parquet"])


def test_parquet_without_pyarrow_tells_the_install_command(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r'pip install "peelwise\[parquet\]"'):
        read_texts([tmp_path / "a.parquet"])


def test_missing_folder_empty_and_none(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(ProbeError, match=r"nowhere\.txt not found: expected a \.txt"):
        read_texts([tmp_path / "nowhere.txt"])
    with pytest.raises(ProbeError, match="is a folder"):
        read_texts([tmp_path])
    with pytest.raises(ProbeError, match=r"empty\.txt holds no text"):
        read_texts([tmp_path / "empty.txt"])
    with pytest.raises(ProbeError, match="at least one file"):
        read_texts([])


def test_reference_prose_is_long_and_repeats_no_paragraph():
    documents = reference_prose()
    paragraphs = [" ".join(part.split()) for text in documents for part in text.split("\n\n") if part.strip()]

    assert sum(map(len, documents)) > 200_000
    assert len(paragraphs) == len(set(paragraphs))
    assert not any(text.split("\n")[1:2] == ["*" * 22] for text in documents)
    assert documents == reference_prose()
