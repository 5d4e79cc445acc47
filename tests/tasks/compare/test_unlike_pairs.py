"""Pairs that are not two plain copies: wrapped, quantised, held in common, broken; and what is refused in one line."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from audits import Snapshot, slow_losses, tiny_probe
from peelwise.errors import ModelError, UnsupportedModelError
from peelwise.records.compare import CompareRecord
from peelwise.tasks.compare.run import Candidate, run_compare
from peelwise.tasks.compare.settings import CompareSettings
from zoo import UNSUPPORTED, ZOO, with_lora


def _compare(old: nn.Module, new: nn.Module) -> CompareRecord:
    return run_compare(Candidate(old, "old"), Candidate(new, "new"), tiny_probe(), CompareSettings(layers_of=1))


class _Named(nn.Module):
    """A model inside another one, with the names that PEFT gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})

    def forward(self, ids: torch.Tensor, **options: Any) -> Any:
        return self.base_model["model"](ids, **options)


@torch.no_grad()
def _merged(adapted: nn.Module) -> nn.Module:
    merged = copy.deepcopy(adapted)
    lora = merged.model.layers[1].mlp.up_proj
    lora.base_layer.weight.add_(lora.lora_B.weight @ lora.lora_A.weight)
    merged.model.layers[1].mlp.up_proj = lora.base_layer
    return merged


@pytest.mark.parametrize("wrap", [lambda model: model, _Named, nn.DataParallel], ids=["bare", "peft", "parallel"])
def test_an_adapter_is_one_change_merged_or_not_whatever_wraps_the_model(wrap: Any) -> None:
    old = ZOO["llama"]()
    adapted = with_lora(copy.deepcopy(old), "up_proj", blocks=("layers.1.",))
    merged, new = _merged(adapted), wrap(adapted)
    before = Snapshot.of(new)
    record = _compare(old, new)
    before.assert_unchanged(new)
    assert record.conclusion.changed == (1,)
    assert record.blocks[1].kind_of_change == "low-rank"
    changed = [t for t in record.blocks[1].tensors if t.kind_of_change != "unchanged"]
    assert [(t.name, t.kind_values) for t in changed] == [("mlp.up_proj.weight", {"rank": 2})]
    assert all(end.kind_of_change == "unchanged" for end in record.ends)
    rows = tiny_probe().report.rows()
    damage = float((slow_losses(merged, rows) - slow_losses(old, rows)).sum()) / sum(len(row) - 1 for row in rows)
    assert record.blocks[1].repairs_nats.mean == pytest.approx(damage, abs=1e-5)
    assert _compare(merged, new).conclusion.case in ("identical", "same-function")  # control: nothing is left


def test_everything_quantised_by_torchao_the_head_too() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    old = ZOO["llama"]()
    new = copy.deepcopy(old)
    torchao.quantize_(new, torchao.Int8WeightOnlyConfig())
    record = _compare(old, new)
    kinds = {end.unit: end.kind_of_change for end in record.ends}
    assert kinds == {"embedding": "unchanged", "norm": "unchanged", "head": "lattice"}
    assert {block.kind_of_change for block in record.blocks} == {"lattice"}
    assert record.ends[2].repairs_nats.mean != 0


def test_a_bias_that_was_zero_has_moved_by_all_of_itself() -> None:
    old = ZOO["gpt2"]()
    with torch.no_grad():
        old.transformer.h[1].mlp.c_fc.bias.zero_()
        new = copy.deepcopy(old)
        new.transformer.h[1].mlp.c_fc.bias.add_(0.1)
    record = _compare(old, new)
    assert record.conclusion.changed == (1,)
    moved = {t.name: t.relative_distance for t in record.blocks[1].tensors if t.kind_of_change != "unchanged"}
    assert moved == {"mlp.c_fc.bias": 1.0}
    assert CompareRecord.model_validate_json(record.to_json()) == record


def test_modules_held_in_common_do_not_run_into_each_other() -> None:
    old = ZOO["llama"]()
    new = copy.deepcopy(old)
    new.lm_head, new.model.layers[0] = old.lm_head, old.model.layers[0]
    with torch.no_grad():
        new.model.norm.weight.mul_(2)
    record = _compare(old, new)
    assert record.conclusion.changed == ()
    assert [end.kind_of_change for end in record.ends] == ["unchanged", "scale", "unchanged"]
    assert record.ends[1].repairs_nats.mean == pytest.approx(record.loss.damage.mean, abs=1e-6)
    assert [note.code for note in record.notes if not isinstance(note, str)] == ["shared-tensors"]


def test_no_gradient_is_ever_asked_for() -> None:
    old = ZOO["llama"]()
    new = copy.deepcopy(old)
    mlp = new.model.layers[1].mlp
    with torch.no_grad():
        mlp.up_proj.weight.mul_(2)
    mlp.forward = torch.no_grad()(mlp.forward)
    record = _compare(old, new)
    assert record.conclusion.changed == (1,)
    assert record.blocks[1].repairs_nats.mean == pytest.approx(record.loss.damage.mean, abs=1e-6)


def test_errors_say_which_of_the_two_it_is() -> None:
    good, bad = ZOO["llama"](), ZOO["llama"]()
    with torch.no_grad():
        bad.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"^NEW: model\.layers\.1\.mlp\.up_proj\.weight holds 1 of"):
        _compare(good, bad)
    with pytest.raises(ModelError, match=r"^OLD: model\.layers\.1"):
        _compare(bad, good)
    with pytest.raises(UnsupportedModelError, match=r"^NEW: Not yet: T5\S+ is an encoder-decoder") as caught:
        _compare(good, UNSUPPORTED["t5"]())
    assert "\n" not in str(caught.value)
