"""Groups where nobody names any: the largest usual ones that divide every layer, and a line that says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import peelwise
from audits import tiny_probe
from gguf_files import llama_of_whole_blocks, write_llama_gguf
from peelwise.engine.fitting import usual_layout
from peelwise.model.layers import LinearLayer
from peelwise.show.words import note_words

PLANNED = peelwise.AllocateSettings(5.0, points=0)


@pytest.mark.parametrize(
    ("widths", "layout", "said"),
    [
        ((64, 192), "group=64", []),
        ((64, 96), "group=32", ["groups of 32 are taken"]),
        ((48, 80), "group=16", ["groups of 16 are taken"]),
        ((128, 24), "channel", ["each output has a scale of its own"]),
        ((63,), "channel", ["each output has a scale of its own"]),
    ],
)
def test_the_largest_usual_group_that_divides_all_layers(widths: tuple[int, ...], layout: str, said: list[str]) -> None:
    linears = [LinearLayer(f"layer{i}", nn.Linear(width, 4), False) for i, width in enumerate(widths)]
    found, notes = usual_layout(linears)
    assert found == layout
    assert len(notes) == len(said)
    assert all(words in note_words(note) for words, note in zip(said, notes, strict=True))


def _codes(record) -> list[str]:
    return [note.code for note in record.notes if note.code in ("smaller-groups", "scales-per-channel")]


def test_formats_that_nobody_gave_fit_the_model_and_are_said() -> None:
    model, probe = llama_of_whole_blocks(), tiny_probe()  # 64 and 96 inputs
    plan = peelwise.allocate(model, probe, PLANNED)
    assert [form.partition(",")[0] for form in plan.record.formats] == [f"int{n}:group=32" for n in (2, 3, 4, 8)]
    assert "int8:group=32" in str(plan.record.settings["formats"])
    assert _codes(plan.record) == ["smaller-groups"]
    assert "groups of 32 are taken" in " ".join(str(plan).split())
    again = peelwise.AllocateSettings(5.0, plan.record.formats, points=0)
    assert _codes(peelwise.allocate(model, probe, again).record) == []


def test_layers_that_are_left_alone_or_planned_do_not_count() -> None:
    model, probe = llama_of_whole_blocks(), tiny_probe()
    down = [name for name, _ in model.named_modules() if name.endswith("down_proj")]  # the layers of 96 inputs
    quick = {"max_sweeps": 0, "curvature": False}
    whole = peelwise.quantise(model, probe, peelwise.QuantiseSettings(**quick)).record
    assert whole.format == "int4:group=32,symmetric"
    assert _codes(whole) == ["smaller-groups"]
    for settings in (
        peelwise.QuantiseSettings(skip=("down_proj",), **quick),
        peelwise.QuantiseSettings(plan=dict.fromkeys(down, "int8:channel"), **quick),
    ):
        record = peelwise.quantise(model, probe, settings).record
        assert {layer.format for layer in record.layers if layer.name not in down} == {"int4:group=64,symmetric"}
        assert _codes(record) == []
    assert record.format == "mixed formats"
    given = peelwise.quantise(model, probe, peelwise.QuantiseSettings("int4:group=32", **quick)).record
    assert (given.format, _codes(given)) == (whole.format, [])


def test_a_gguf_file_has_groups_of_32(tmp_path: Path) -> None:
    write_llama_gguf(llama_of_whole_blocks(), tmp_path / "model.gguf", "Q8_0")
    settings = peelwise.QuantiseSettings(skip=("down_proj",), max_sweeps=0, curvature=False)  # 64 divides the others
    made = peelwise.quantise(tmp_path / "model.gguf", tiny_probe(), settings, out=tmp_path / "out", to="gguf")
    assert made.record.format == "int4:group=32,symmetric"
    assert (tmp_path / "out" / "model.gguf").is_file()
