"""`peelwise.compare` in Python: a quantised file beside the folder that it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest

import peelwise
from audits import tiny_probe
from gguf_files import llama_of_whole_blocks, write_llama_gguf
from peelwise.errors import ModelError
from peelwise.model.checkpoints import save_model


@pytest.mark.parametrize("as_stored", [False, True])
def test_a_gguf_file_against_its_parent_as_stored_or_not(as_stored: bool, tmp_path: Path) -> None:
    parent, file = tmp_path / "parent", tmp_path / "small.gguf"
    save_model(llama_of_whole_blocks(), None, parent)
    write_llama_gguf(llama_of_whole_blocks(), file, "Q4_0")
    opening = peelwise.OpenOptions(as_stored=as_stored)
    record = peelwise.compare(parent, file, tiny_probe(), opening=opening).record
    assert (record.old.as_stored, record.model.as_stored) == (False, as_stored)
    assert [block.kind_of_change for block in record.blocks] == ["lattice", "lattice"]
    assert {end.kind_of_change for end in record.ends} == {"unchanged"}  # stored in float32
    values = [tensor.kind_values for block in record.blocks for tensor in block.tensors if tensor.kind_values]
    assert values == [{"group": 32, "steps": 15}] * 14
    if as_stored:  # two folders have nothing that could be taken so
        with pytest.raises(ModelError, match=r"only the blocks of a \.gguf file"):
            peelwise.compare(parent, parent, tiny_probe(), opening=opening)
