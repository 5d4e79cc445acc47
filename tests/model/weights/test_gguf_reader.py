"""Our reader of GGUF files against the package's, which is slow and obvious."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from gguf_files import llama_of_whole_blocks, write_llama_gguf
from peelwise.model import loading
from peelwise.model.checkpoints import OpenedModel, open_model
from peelwise.model.fingerprint import fingerprint
from peelwise.model.weights import gguf_reader
from peelwise.model.weights.gguf_header import check_gguf
from peelwise.model.weights.gguf_reader import FileReader, dequantize

gguf = pytest.importorskip("gguf")

KINDS = [
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "TQ1_0",
    "TQ2_0",
    "IQ4_NL",
    "BF16",
]
VOCABULARY = ["a", "b", "<s>", "Ġ", "é", "ab"] + [chr(200 + n) for n in range(91)]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file with a value of every type, tensors of numbers and of blocks, and an alignment that is not usual."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_custom_alignment(128)
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        unsigned = kind.startswith("u")
        value = 2 ** (int(kind.strip("uint")) - (0 if unsigned else 1)) - 1
        getattr(writer, f"add_{kind}")(f"test.{kind}", value if unsigned else -value)
    writer.add_float32("test.float32", 0.1)
    writer.add_float64("test.float64", 0.1)
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "日本 é")
    writer.add_array("test.strings", ["", "é", "a" * 300])
    writer.add_array("test.integers", [-1, 2**31 - 1])
    writer.add_array("test.floats", [0.1, -3.5])
    writer.add_array("test.flags", [True, False])
    W = np.random.default_rng(0).standard_normal((3, 5, 64), dtype=np.float32)
    for dtype in (np.float16, np.float32, np.float64, np.int8, np.int32):
        writer.add_tensor(f"numbers.{np.dtype(dtype).name}", (9 * W).astype(dtype))
    for kind in ("Q4_1", "Q8_0"):
        type_ = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"blocks.{kind}", gguf.quants.quantize(W, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf"


def values(reader: object) -> dict[str, list[object]]:
    """Return every field as transformers parses it."""
    parse = pytest.importorskip("transformers.integrations.ggml")._gguf_parse_value
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return {name: [parse(field.parts[i], field.types) for i in field.data] for name, field in fields.items()}


def test_fields_and_tensors_are_those_of_the_package(written: Path) -> None:
    ours, theirs = FileReader(written), gguf.GGUFReader(written)
    assert values(ours) == values(theirs)
    assert [repr(v) for v in values(ours).values()] == [repr(v) for v in values(theirs).values()]  # their types too
    assert ours.get_field("test.bool") is ours.fields["test.bool"]
    assert ours.get_field("absent") is None
    for one, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (one.name, one.tensor_type, one.shape.tolist()) == (other.name, other.tensor_type, other.shape.tolist())
        assert one.data.dtype == other.data.dtype
        np.testing.assert_array_equal(one.data, other.data)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow)")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 256), (7, 256), (60, 512), (3, 8, 256)])
def test_weights_are_those_of_the_package(kind: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    type_ = gguf.GGMLQuantizationType[kind]
    _, size = gguf.GGML_QUANT_SIZES[type_]
    blocks = gguf.quant_shape_to_byte_shape(shape, type_)
    data = np.random.default_rng(0).integers(0, 256, blocks, dtype=np.uint8)
    expected = gguf.quants.dequantize(data, type_)
    for longest in (1, 5 * blocks[-1], 2**15):
        monkeypatch.setattr(gguf_reader, "_ROW_BYTES", longest)
        found = dequantize(data, type_)
        assert found.shape == expected.shape == shape
        assert found.tobytes() == expected.tobytes()  # random bytes make NaN scales too
    data.reshape(-1)[size - 1] ^= 255  # the last byte of a block, codes or scale
    assert dequantize(data, type_).tobytes() != expected.tobytes()


@pytest.mark.parametrize(("kind", "others"), [("Q4_1", "Q8_0"), ("Q8_0", "F16"), ("Q5_0", "BF16")])
def test_a_model_opens_the_same_with_either_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, others: str
) -> None:
    file = tmp_path / "model.gguf"
    write_llama_gguf(llama_of_whole_blocks(), file, kind, others=others, vocabulary=VOCABULARY)
    ours = open_model(file)
    used: list[ExitStack] = []
    monkeypatch.setattr(loading, "_read_quickly", used.append)  # nothing is replaced
    theirs = open_model(file)
    assert used
    assert described(ours) == described(theirs)
    assert ours.tokenizer("aba")["input_ids"][-2:] == [5, 0]  # what stands before it is a matter of versions
    assert ours.tokenizer("aba") == theirs.tokenizer("aba")
    raw = bytearray(file.read_bytes())
    raw[check_gguf(file).tensors["output.weight"].start + 1] ^= 128  # a sign: of a scale, or of a weight
    file.write_bytes(raw)
    assert described(ours) != described(open_model(file))


def described(opened: OpenedModel) -> tuple[str, object, str]:
    return fingerprint(opened.model), opened.model.config.to_dict(), opened.tokenizer.backend_tokenizer.to_str()


def test_the_package_is_as_before_when_a_model_is_open(tmp_path: Path) -> None:
    before = gguf.GGUFReader, gguf.dequantize
    write_llama_gguf(llama_of_whole_blocks(), tmp_path / "model.gguf", "Q8_0")
    open_model(tmp_path / "model.gguf", with_tokenizer=False)
    assert (gguf.GGUFReader, gguf.dequantize) == before
