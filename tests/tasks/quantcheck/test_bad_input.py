"""What files in the wild hold: zeros where numbers are expected, NaN, too little text."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import peelwise
from audits import part_of, tiny_probe
from gguf_files import llama_of_whole_blocks, write_llama_gguf
from packed_files import CASES, write_packed
from peelwise.errors import PeelwiseError
from peelwise.nn import quantize_
from peelwise.tasks.quantcheck.settings import QuantcheckSettings

QUICK = QuantcheckSettings(max_sweeps=1)
LAYER = "model.layers.1.mlp.up_proj"


def _finite(record) -> bool:
    numbers = [record.loss.quantised, record.loss.best, *(layer.error for layer in record.layers)]
    numbers += [layer.split.left_on_the_table for layer in record.layers if layer.split]
    return all(map(math.isfinite, numbers))


@pytest.mark.parametrize("case", ["gptq", "awq", "pack-quantized", "fp8-blocks"])
def test_scales_of_zero_are_weights_of_zero(tmp_path: Path, case: str) -> None:
    parent = llama_of_whole_blocks()
    write_packed(parent, tmp_path, *CASES[case])
    stored = load_file(tmp_path / "model.safetensors")
    name = next(n for n in stored if n.startswith(LAYER) and "scale" in n and "zero" not in n)
    stored[name][..., :1] = 0
    save_file(stored, tmp_path / "model.safetensors")
    record = peelwise.quantcheck(tmp_path, parent, tiny_probe(in_distribution=True), QUICK).record
    assert _finite(record)
    layer = next(layer for layer in record.layers if layer.name == LAYER)
    assert layer.error > max(other.error for other in record.layers if other.name != LAYER)


def test_rows_and_matrices_of_zeros_in_the_parent_do_no_harm() -> None:
    parent = llama_of_whole_blocks()
    with torch.no_grad():
        parent.get_submodule(LAYER).weight[:3] = 0
        parent.model.layers[0].self_attn.o_proj.weight.zero_()
    quantised = copy.deepcopy(parent)
    quantize_(quantised, "int3:group=32")
    record = peelwise.quantcheck(quantised, parent, tiny_probe(in_distribution=True), QUICK).record
    assert _finite(record)
    empty = next(layer for layer in record.layers if layer.name == "model.layers.0.self_attn.o_proj")
    assert empty.error == 0


@pytest.mark.parametrize("as_stored", [False, True])
def test_a_block_with_a_scale_of_nan_is_named(tmp_path: Path, as_stored: bool) -> None:
    gguf = pytest.importorskip("gguf")
    parent, file = llama_of_whole_blocks(), tmp_path / "model.gguf"
    write_llama_gguf(parent, file, "Q4_0")
    reader = gguf.GGUFReader(file, "r+")
    tensor = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
    tensor.data[0, :2] = np.frombuffer(np.float16(np.nan).tobytes(), dtype=np.uint8)
    reader.data.flush()
    opening = peelwise.OpenOptions(as_stored=as_stored)
    with pytest.raises(PeelwiseError, match=r"model.layers.1.mlp.up_proj.* NaN"):
        peelwise.quantcheck(file, parent, tiny_probe(in_distribution=True), QUICK, opening=opening)


def test_a_layer_with_a_scale_of_nan_is_named() -> None:
    parent = llama_of_whole_blocks()
    quantised = copy.deepcopy(parent)
    quantize_(quantised, "int4:group=32")
    layer = quantised.get_submodule(LAYER)
    layer.hold_(layer.encoded())
    layer.scales[0, 0] = float("nan")
    with pytest.raises(PeelwiseError, match=rf"{LAYER}.*NaN"):
        peelwise.quantcheck(quantised, parent, tiny_probe(in_distribution=True), QUICK)


def test_a_text_shorter_than_a_layer_is_wide_is_said() -> None:
    parent = llama_of_whole_blocks()
    quantised = copy.deepcopy(parent)
    quantize_(quantised, "int4:group=32")
    probe = tiny_probe(in_distribution=True)
    few = part_of(probe, fit=3)
    (said,) = (n for n in peelwise.quantcheck(quantised, parent, few, QUICK).record.notes if n.code == "few-fit-tokens")
    assert said.values["tokens"] < said.values["inputs"] == 96
    assert said.values["layer"].endswith("down_proj")
    enough = peelwise.quantcheck(quantised, parent, probe, QUICK).record
    assert enough.probe.fit_tokens > 96
    assert not any(note.code == "few-fit-tokens" for note in enough.notes)
