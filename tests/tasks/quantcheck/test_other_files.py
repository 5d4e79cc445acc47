"""Quantised files of other tools against each other and against their parent."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import peelwise
from audits import tiny_probe
from gguf_files import llama_of_whole_blocks, write_llama_gguf
from packed_files import CASES, write_packed
from peelwise.formats.table import parse_format
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoints import open_model
from peelwise.model.weights.gguf import BLOCK_FORMATS
from peelwise.model.weights.gguf_writer import write_gguf
from peelwise.show.quantcheck.terminal import render
from peelwise.tasks.quantcheck.settings import QuantcheckSettings

QUICK = QuantcheckSettings(max_sweeps=1)


def _shown(record) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(record))
    return console.export_text()


@pytest.mark.parametrize("case", ["gptq", "fp8-blocks", "awq"])
def test_a_folder_is_compared_with_its_parent_in_its_own_format(tmp_path: Path, case: str) -> None:
    parent = llama_of_whole_blocks()
    write_packed(parent, tmp_path, *CASES[case])
    record = peelwise.quantcheck(tmp_path, parent, tiny_probe(in_distribution=True), QUICK).record
    assert len(record.layers) == 14
    for layer in record.layers:
        assert 0 < layer.error < (0.002 if "fp8" in case else 0.02)
        parts = layer.split
        assert parts.price_of_precision + parts.left_on_the_table == pytest.approx(layer.error)
        assert parts.left_on_the_table > 0
    assert not record.notes


def test_layers_without_a_format_of_ours_have_an_error_and_no_parts(tmp_path: Path) -> None:
    parent = llama_of_whole_blocks()
    write_packed(parent, tmp_path, *CASES["gptq-act-order"])
    record = peelwise.quantcheck(tmp_path, parent, tiny_probe(in_distribution=True), QUICK).record
    assert record.complete
    assert len(record.layers) == 14
    for layer in record.layers:
        assert layer.format == "gptq, numbers"
        assert layer.error > 0
        assert layer.split is None
        assert not layer.codes
    assert [note.code for note in record.notes] == ["read-as-numbers"]
    text = _shown(record)
    assert "14 quantised layers (gptq) are read as plain numbers" in text
    assert "not measured within the budget" not in text
    assert "up_proj" in text


def test_two_quantised_files_are_compared_with_each_other(tmp_path: Path) -> None:
    """The parent is a file of eight bits: what four bits lose beside it is about what they lose beside the original."""
    model, file = llama_of_whole_blocks(), tmp_path / "model.gguf"
    write_llama_gguf(model, file, "Q8_0")
    write_packed(model, tmp_path / "awq", *CASES["awq"])
    probe = tiny_probe(in_distribution=True)
    beside_file = peelwise.quantcheck(tmp_path / "awq", file, probe, QUICK).record
    beside_model = peelwise.quantcheck(tmp_path / "awq", model, probe, QUICK).record
    for a, b in zip(beside_file.layers, beside_model.layers, strict=True):
        assert a.error == pytest.approx(b.error, rel=0.1)
    assert beside_file.loss.damage.mean == pytest.approx(beside_model.loss.damage.mean, abs=3e-3)
    back = peelwise.quantcheck(file, tmp_path / "awq", probe, QUICK).record
    assert {layer.format for layer in back.layers} == {"int8:group=32,symmetric"}


def test_a_check_and_an_audit_of_a_folder_see_the_weights_that_it_stores(tmp_path: Path) -> None:
    parent = llama_of_whole_blocks()
    expected = write_packed(parent, tmp_path, *CASES["pack-quantized"])
    plain = llama_of_whole_blocks()
    plain.load_state_dict(expected)
    probe = tiny_probe(in_distribution=True)
    there, here = (peelwise.check(model, probe).record for model in (tmp_path, plain))
    assert there.loss == pytest.approx(here.loss, abs=1e-6)
    audited = peelwise.audit(tmp_path, probe, budget=4).record
    assert audited.loss.current == pytest.approx(here.loss, abs=1e-6)
    assert any(note.code == "low-bit" for note in audited.notes)


def test_blocks_of_a_gguf_file_that_are_not_read_have_an_error_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, file = llama_of_whole_blocks(), tmp_path / "model.gguf"
    write_llama_gguf(parent, file, "Q5_0")
    probe = tiny_probe(in_distribution=True)
    settings = QuantcheckSettings(budget=1e-6)
    read = peelwise.quantcheck(file, parent, probe, settings).record
    monkeypatch.delitem(BLOCK_FORMATS, "Q5_0")
    record = peelwise.quantcheck(file, parent, probe, settings).record
    for layer, known in zip(record.layers, read.layers, strict=True):
        assert (layer.format, layer.bits_per_weight, layer.codes) == ("Q5_0", 5.5, False)
        assert layer.error == pytest.approx(known.error, rel=1e-5)
    (said,) = (note for note in record.notes if note.code == "read-as-numbers")
    assert said.values == {"method": "Q5_0", "layers": 14, "codes": 0}


FOLDERS = ("pack-quantized", "int-quantized", "bitsandbytes-nf4", "bitsandbytes-int8", "fp8-blocks")
SUPER_BLOCKS = tuple(f"q{bits}_k" for bits in range(2, 7))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return one model in every kind of file, wide enough for K-quants."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=97, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    model, folder = LlamaForCausalLM(config).eval(), tmp_path_factory.mktemp("files")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4.0)
    write_llama_gguf(model, folder / "plain.gguf", "F32")
    found = {"plain": folder / "plain.gguf"}
    source = open_model(folder / "plain.gguf", device="cpu", with_tokenizer=False).model
    linears = [linear for block in find_blocks(source) for linear in block.linears]
    for kind in SUPER_BLOCKS:
        form, found[kind] = parse_format(kind), folder / f"{kind}.gguf"
        write_gguf(
            folder / "plain.gguf", found[kind], source, {m.name: (form, form.encode(m.weight())) for m in linears}
        )
    for case in FOLDERS:
        found[case] = folder / case
        write_packed(source, found[case], *CASES[case])
    return found


KINDS = (*FOLDERS, *SUPER_BLOCKS)


@pytest.mark.parametrize(("kind", "other"), [(kind, KINDS[n - 1]) for n, kind in enumerate(KINDS)])
def test_any_file_beside_any_other(files: dict[str, Path], kind: str, other: str) -> None:
    """Errors beside another quantised file are those of the two weights apart; beside the plain one, its own alone."""
    probe = tiny_probe(in_distribution=True)
    settings = QuantcheckSettings(budget=1e-6)
    beside = peelwise.quantcheck(files[kind], files[other], probe, settings).record
    alone = {each: peelwise.quantcheck(files[each], files["plain"], probe, settings).record for each in (kind, other)}
    assert len(beside.layers) == 7
    for layer, *own in zip(beside.layers, *(record.layers for record in alone.values()), strict=True):
        assert layer.format == own[0].format
        assert layer.error > 0
        # Roundings of two tools are about independent: squared errors add up.
        assert layer.error == pytest.approx(own[0].error + own[1].error, rel=0.5)
    gap = alone[kind].loss.quantised - alone[other].loss.quantised
    assert beside.loss.damage.mean == pytest.approx(gap, abs=1e-4)
