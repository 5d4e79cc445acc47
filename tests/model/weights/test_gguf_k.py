"""K-quants: read and written to the bit as the gguf package reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gguf_files import write_llama_gguf
from peelwise.errors import FormatError
from peelwise.formats import parse_format
from peelwise.formats.base import Encoded
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoints import open_model
from peelwise.model.weights.gguf import read_blocks, stored_layers
from peelwise.model.weights.gguf_k import LAYOUTS
from peelwise.model.weights.gguf_writer import pack, write_gguf

gguf = pytest.importorskip("gguf")

FACTORS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def _any_blocks(kind: str, rows: int = 6) -> np.ndarray:
    """Bytes that any file may hold: all integers of all groups, and factors of both signs."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (2 * rows, LAYOUTS[kind].size), dtype=np.uint8)
    for at in FACTORS[kind]:
        raw[:, at : at + 2] = rng.normal(size=(2 * rows, 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_super_blocks_are_read_as_the_package_reads_them_and_written_as_they_were(kind: str) -> None:
    raw, type_ = _any_blocks(kind), gguf.GGMLQuantizationType[kind]
    assert gguf.GGML_QUANT_SIZES[type_] == (256, LAYOUTS[kind].size)
    form, encoded = read_blocks(kind, raw)
    assert np.array_equal(form.decode(encoded).numpy(), gguf.quants.dequantize(raw, type_))
    blocks = raw.reshape(-1, LAYOUTS[kind].size)
    assert np.array_equal(LAYOUTS[kind].write(LAYOUTS[kind].read(blocks)), blocks)
    other = blocks.copy()
    other[0, FACTORS[kind][-1] - 1] ^= 16
    assert not np.array_equal(LAYOUTS[kind].write(LAYOUTS[kind].read(other)), blocks)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_codes_of_the_format_are_what_the_package_reads(kind: str) -> None:
    form, W = parse_format(kind.lower()), torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    W[1, :256] = 0
    encoded = form.encode(W)
    data = pack(kind, encoded)
    assert np.array_equal(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]), form.decode(encoded).numpy())


def test_scales_that_no_super_block_has_are_refused() -> None:
    form = parse_format("q4_k")
    encoded = form.encode(torch.randn(4, 256))
    with pytest.raises(FormatError, match="no products of a float16 number and integers"):
        pack("Q4_K", Encoded(encoded.codes, encoded.scales * 1.01 + 0.003, encoded.zeros))


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=33, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    ).eval()


@pytest.mark.parametrize("kind", ["Q3_K", "Q4_K"])
def test_a_file_of_super_blocks_is_opened_with_its_codes_and_written_with_others(tmp_path: Path, kind: str) -> None:
    file, again = tmp_path / "model.gguf", tmp_path / "again.gguf"
    form = parse_format(kind.lower())
    write_llama_gguf(_model(), file, "F32")
    source = open_model(file, device="cpu", with_tokenizer=False).model
    linears = [linear for block in find_blocks(source) for linear in block.linears]
    write_gguf(file, again, source, {m.name: (form, form.encode(m.weight())) for m in linears})

    plain = open_model(again, device="cpu", with_tokenizer=False).model
    stored = open_model(again, device="cpu", with_tokenizer=False, as_stored=True).model
    by_name = {linear.name: linear for block in find_blocks(stored) for linear in block.linears}
    for linear in linears:
        held = by_name[linear.name].held()
        assert held.format == form
        assert torch.equal(held.weight, form.project(linear.weight()))
        assert torch.equal(held.weight, plain.get_submodule(linear.name).weight)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, stored(ids).logits)
    assert len(stored_layers(again, find_blocks(plain))) == len(linears)
