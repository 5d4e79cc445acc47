"""GGUF files with other codes: packed as ggml packs them, everything else as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gguf_files import llama_of_whole_blocks, write_llama_gguf
from peelwise.errors import FormatError
from peelwise.formats.table import parse_format
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoints import open_model
from peelwise.model.weights.gguf import BLOCK_FORMATS, read_blocks, stored_layers
from peelwise.model.weights.gguf_reader import FileReader, dequantize
from peelwise.model.weights.gguf_writer import PACKERS, kind_of, pack, write_gguf

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("kind", PACKERS)
def test_packed_codes_are_what_the_package_reads(kind):
    form = parse_format(BLOCK_FORMATS[kind][0])
    W = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    encoded = form.encode(W)
    data = pack(kind, encoded)
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(theirs, form.decode(encoded).numpy())
    again_form, again = read_blocks(kind, data)
    assert again_form == form
    assert torch.equal(again.codes.to(torch.int16), encoded.codes.to(torch.int16))
    assert torch.equal(again.scales, encoded.scales)


def test_formats_that_gguf_does_not_have_are_refused_with_those_that_it_has():
    with pytest.raises(FormatError, match=r"no blocks for int3.*int4:group=32 \(Q4_0\)"):
        kind_of(parse_format("int3:group=64"))


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "F16"])
def test_other_codes_in_an_opened_file(tmp_path, kind):
    """Rows of queries and keys stand in another order in the file; all that is not asked about stays."""
    source, file = tmp_path / "source.gguf", tmp_path / "new.gguf"
    write_llama_gguf(llama_of_whole_blocks(), source, kind)
    model = open_model(source, device="cpu", with_tokenizer=False).model
    form = parse_format("int5:group=32,minimum")
    linears = [linear for block in find_blocks(model) for linear in block.linears]
    left = linears[-1].name
    codes = {linear.name: (form, form.encode(linear.weight())) for linear in linears[:-1]}
    write_gguf(source, file, model, codes)

    again = open_model(file, device="cpu", with_tokenizer=False).model
    stored = stored_layers(file, find_blocks(again))
    by_name = {linear.name: held for linear, held in stored.items()}
    for name, (_, encoded) in codes.items():
        assert torch.equal(again.get_submodule(name).weight, form.decode(encoded)), name
        assert by_name[name].format == form
    before, after = (dict(model.named_parameters()), dict(again.named_parameters()))
    same = [name for name in before if name.removesuffix(".weight") not in codes]
    assert f"{left}.weight" in same
    assert all(torch.equal(before[name], after[name]) for name in same)
    old, new = gguf.GGUFReader(source), gguf.GGUFReader(file)
    ours = [name for name in old.fields if not name.startswith("GGUF.")]
    assert {name: old.fields[name].contents() for name in ours} == {
        name: new.fields[name].contents() for name in new.fields if not name.startswith("GGUF.")
    }


def test_a_file_of_another_model_is_refused(tmp_path):
    source = tmp_path / "source.gguf"
    write_llama_gguf(llama_of_whole_blocks(), source, "Q8_0")
    model = open_model(source, device="cpu", with_tokenizer=False).model
    linear = find_blocks(model)[0].linears[0]
    with torch.no_grad():
        linear.module.weight.add_(1)
    form = parse_format("int8:group=32")
    with pytest.raises(FormatError, match="does not store the weights of"):
        write_gguf(source, tmp_path / "new.gguf", model, {linear.name: (form, form.encode(linear.weight()))})


def test_the_packaged_readers_agree(tmp_path):
    file = tmp_path / "source.gguf"
    write_llama_gguf(llama_of_whole_blocks(), file, "Q4_1")
    tensor = next(t for t in FileReader(file).tensors if t.tensor_type.name == "Q4_1")
    assert np.array_equal(
        dequantize(tensor.data, tensor.tensor_type), gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    )
