"""Folders with torchao's weights: opened again by peelwise and by transformers, the same to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import peelwise
from audits import Snapshot, tiny_probe
from gguf_files import llama_of_whole_blocks
from peelwise.errors import FormatError
from peelwise.formats import parse_format
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoints import open_model
from peelwise.model.torchao_writer import check_torchao, write_torchao

pytest.importorskip("torchao")


@pytest.mark.parametrize("name", ["int4:group=32", "int3:channel,affine", "int8:group=32,scale=bfloat16"])
def test_codes_are_those_that_were_written(tmp_path: Path, name: str) -> None:
    import transformers

    model, form = llama_of_whole_blocks(), parse_format(name)
    before = Snapshot.of(model)
    linears = [linear for block in find_blocks(model) for linear in block.linears]
    left = linears[-1].name
    # Scales of other rules than torchao's own: its rounding of these weights would be another matrix.
    codes = {m.name: (form, form.encode(m.weight() * 1.1)) for m in linears[:-1]}
    write_torchao(model, None, codes, tmp_path / "out")
    before.assert_unchanged(model)
    ours = open_model(tmp_path / "out", device="cpu", with_tokenizer=False).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    by_name = {linear.name: linear for block in find_blocks(ours) for linear in block.linears}
    for layer, (_, encoded) in codes.items():
        held = by_name[layer].held()
        assert torch.equal(held.weight, form.decode(encoded))
        assert held.format.levels == form.levels
        assert torch.equal(theirs.get_submodule(layer).weight.dequantize(), held.weight)
    assert by_name[left].held() is None
    assert torch.equal(by_name[left].weight(), linears[-1].weight())
    assert torch.equal(ours.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("name", ["ternary", "int4:minimum", "int4:tensor", "nf4:group=32", "q4_k"])
def test_formats_that_torchao_does_not_have_are_refused_before_the_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match="torchao has no weights for"):
        check_torchao(parse_format(name))
    settings = peelwise.QuantiseSettings(name)
    with pytest.raises(FormatError, match="Expected int2 to int8, symmetric or affine"):
        peelwise.quantise(llama_of_whole_blocks(), tiny_probe(), settings, out=tmp_path / "out", to="torchao")
    assert not (tmp_path / "out").exists()


def test_quantise_writes_it(tmp_path: Path) -> None:
    settings = peelwise.QuantiseSettings("int4:group=32", max_sweeps=0, curvature=False)
    report = peelwise.quantise(llama_of_whole_blocks(), tiny_probe(), settings, out=tmp_path / "out", to="torchao")
    opened = open_model(tmp_path / "out", device="cpu", with_tokenizer=False).model
    for name, (form, encoded) in report.codes.items():
        assert torch.equal(opened.get_submodule(name).weight.dequantize(), form.decode(encoded))
    assert (tmp_path / "out" / "quantise.json").exists()
