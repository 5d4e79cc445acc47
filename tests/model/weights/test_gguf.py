from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from peelwise.errors import FormatError, ModelError, UnsupportedModelError
from peelwise.formats.table import parse_format
from peelwise.model.architectures import find_blocks
from peelwise.model.weights.gguf import BLOCK_FORMATS, read_blocks, stored_layers
from peelwise.model.weights.gguf_k import LAYOUTS
from peelwise.nn.files import hold_in
from zoo import ZOO

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("kind", sorted(BLOCK_FORMATS.keys() - LAYOUTS.keys()))
def test_blocks_are_read_as_the_reference_reads_them(kind: str) -> None:
    W = torch.randn(5, 512, generator=torch.Generator().manual_seed(0)).numpy()
    W[2, :256] = 0.0
    type_ = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(W, type_)
    form, encoded = read_blocks(kind, data)
    expected = torch.from_numpy(gguf.quants.dequantize(data, type_).reshape(W.shape))
    torch.testing.assert_close(form.decode(encoded), expected, rtol=0, atol=0)
    block, width = gguf.GGML_QUANT_SIZES[type_]
    # Ternary codes are packed into two bits; everything else takes what the format says.
    stored = form.bits_per_weight(5, 512) + (2 - np.log2(3) if kind == "TQ2_0" else 0)
    assert stored == pytest.approx(8 * width / block)


def _written(folder: Path, kind: str, *, permuted: bool = False) -> tuple[Path, object]:
    """A model of the zoo with every map stored in blocks, and the model with the weights that the file holds."""
    blocks = find_blocks(ZOO["llama"]().requires_grad_(False))
    type_ = gguf.GGMLQuantizationType[kind]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(blocks))
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for linear in (linear for block in blocks for linear in block.linears):
        weight = linear.module.weight
        padded = torch.zeros(weight.shape[0], 96).copy_(torch.nn.functional.pad(weight, (0, 96 - weight.shape[1])))
        linear.module.weight.data, linear.module.in_features = padded, 96
        # 96 inputs are whole blocks; the model itself is not run here
        data = gguf.quants.quantize(padded.numpy(), type_)
        padded.copy_(torch.from_numpy(gguf.quants.dequantize(data, type_).reshape(padded.shape)))
        order = np.random.default_rng(0).permutation(len(data)) if permuted and "q_proj" in linear.name else slice(None)
        name = names.get_name(linear.name, try_suffixes=(".weight",))
        writer.add_tensor(f"{name}.weight", data[order], raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf", blocks


@pytest.mark.parametrize("permuted", [False, True])
def test_every_map_of_a_file_is_found_with_the_very_weights_of_the_model(tmp_path: Path, permuted: bool) -> None:
    file, blocks = _written(tmp_path, "Q4_1", permuted=permuted)
    found = stored_layers(file, blocks)
    assert len(found) == sum(len(block.linears) for block in blocks)
    for linear, held in found.items():
        assert held.format == parse_format("int4:group=32,minimum")
        torch.testing.assert_close(held.weight, linear.weight(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_a_layer_can_compute_with_the_codes_of_the_file(tmp_path: Path, kind: str) -> None:
    file, blocks = _written(tmp_path, kind)
    for block in blocks[:1]:
        stored = {m: h for m, h in stored_layers(file, blocks).items() if m in block.linears}
        for linear, held in stored.items():
            name = linear.name.removeprefix(f"{block.name}.")
            hold_in(block.module, name, held.format, held.encoded)
            layer = block.module.get_submodule(name)
            torch.testing.assert_close(layer.effective_weight(), linear.weight(), rtol=0, atol=0)
            torch.testing.assert_close(layer.encoded().codes, held.encoded.codes, rtol=0, atol=0)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    file, blocks = _written(tmp_path, "Q8_0")
    blocks[1].linears[3].module.weight.data[0, 0] += 1
    with pytest.raises(FormatError, match=rf"does not store the weights of {blocks[1].linears[3].name}"):
        stored_layers(file, blocks)
    with pytest.raises(FormatError, match="holds no tensor for"):
        stored_layers(file, find_blocks(ZOO["gpt2"]()))


def test_other_block_formats_are_declined_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, blocks = _written(tmp_path, "Q5_0")
    monkeypatch.delitem(BLOCK_FORMATS, "Q5_0")
    with pytest.raises(UnsupportedModelError, match="stored as Q5_0"):
        stored_layers(file, blocks)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    file, blocks = _written(tmp_path, "Q4_0")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged"):
        stored_layers(file, blocks)
