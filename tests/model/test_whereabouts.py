"""Weights that are elsewhere, tied in the configuration alone, or other ones than those of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import peelwise
from audits import tiny_probe
from peelwise.engine.opening import checked_blocks
from peelwise.errors import ModelError, UnsupportedModelError
from peelwise.model.whereabouts import check_in_memory, checkpoint_note, untied_note
from peelwise.records.base import Note
from peelwise.show.words import note_words
from zoo import ZOO, with_lora


def untied(change: Callable[[nn.Parameter], object]) -> list[Note]:
    model = ZOO["llama-tied"]()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        change(model.lm_head.weight)
    return list(untied_note(model))


def test_a_head_that_is_tied_in_the_configuration_alone_is_told() -> None:
    (said,) = untied(lambda weight: weight.mul_(1.01))
    assert said.values == {"embedding": "model.embed_tokens", "head": "lm_head", "same": 0}
    (same,) = untied(lambda weight: None)
    assert same.values["same"] == 1
    assert "model.embed_tokens and lm_head share one weight; in memory each has its own" in note_words(said)


@pytest.mark.parametrize("name", ["llama-tied", "llama", "gpt2", "opt", "plain"])
def test_models_that_are_as_their_configuration_says_are_not(name: str) -> None:
    assert list(untied_note(ZOO[name]())) == []


# -- against a checkpoint -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    ZOO["llama-tied"]().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_checkpoint_of_the_model_agrees_in_any_dtype(saved: Path) -> None:
    for model in (ZOO["llama-tied"](), ZOO["llama-tied"]().to(torch.bfloat16)):
        found = checkpoint_note(model, saved).values
        assert (found["differ"], found["only_model"], found["only_file"]) == (0, 0, 0)
        assert found["compared"] == len(list(model.parameters()))
        assert found["names"] == "none"


def test_what_differs_is_named(saved: Path) -> None:
    model = ZOO["llama-tied"]()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
        model.model.norm.weight[0] = 7
    found = checkpoint_note(model, saved).values
    assert found["differ"] == 2
    assert found["names"] == "model.layers.1.mlp.up_proj.weight, model.norm.weight"


def test_names_of_adapters_are_seen_through(saved: Path) -> None:
    model = with_lora(ZOO["llama-tied"](), "q_proj")
    found = checkpoint_note(model, saved).values
    assert (found["differ"], found["only_model"], found["only_file"]) == (0, 6, 0)
    model.model.layers[0].self_attn.q_proj.base_layer.weight.data.mul_(2)
    assert checkpoint_note(model, saved).values["names"] == "model.layers.0.self_attn.q_proj.weight"


def test_layers_that_only_one_of_them_has_are_counted(saved: Path) -> None:
    model = ZOO["llama-tied"]()
    del model.model.layers[2]
    found = checkpoint_note(model, saved).values
    assert (found["differ"], found["only_model"]) == (0, 0)
    assert found["only_file"] == sum("layers.2." in name for name, _ in ZOO["llama-tied"]().named_parameters())


def test_another_models_checkpoint_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match="has no tensor of the model"):
        checkpoint_note(ZOO["plain"](), saved)
    with pytest.raises(ModelError, match="is no folder"):
        checkpoint_note(ZOO["plain"](), saved / "config.json")


def test_an_audit_says_what_differs(saved: Path) -> None:
    model = ZOO["llama-tied"]()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    settings = peelwise.AuditSettings("60s", joint_rounds=0, solo_rounds=0, controls=False)
    notes = peelwise.audit(model, tiny_probe(), settings, checkpoint=saved).record.notes
    (said,) = [note for note in notes if isinstance(note, Note) and note.code == "checkpoint"]
    assert "1 of 29 tensors differ" in note_words(said)
    assert "model.layers.1.mlp.up_proj.weight" in note_words(said)


# -- moved away ---------------------------------------------------------------------------------------------------


def test_weights_that_are_not_in_memory_are_refused_by_name() -> None:
    model = ZOO["llama"]()
    check_in_memory(model)  # the control
    model.model.norm.to("meta")
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight has no values"):
        checked_blocks(model, tiny_probe())


def test_weights_that_accelerate_brings_for_each_call_are_refused_by_name_where_nobody_brings_them() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = ZOO["llama"]()
    accelerate.cpu_offload(model.model.layers[1], execution_device="cpu")
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.\S+ (has no values|is offloaded)"):
        checked_blocks(model, tiny_probe())
