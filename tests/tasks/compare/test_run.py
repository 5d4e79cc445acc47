"""Two models of one architecture: every effect against whole models built by hand, and what must not be named."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import damage
from audits import Snapshot, part_of, slow_losses, tiny_probe
from peelwise.errors import ModelError, OptionError
from peelwise.model.architectures import find_blocks
from peelwise.nn import quantize_
from peelwise.probe.probe import Probe
from peelwise.records.compare import CompareRecord
from peelwise.tasks.compare.run import Candidate, run_compare
from peelwise.tasks.compare.settings import CompareSettings
from zoo import ZOO

ALL = CompareSettings(layers_of=9)


def _compare(
    old: nn.Module, new: nn.Module, settings: CompareSettings = ALL, probe: Probe | None = None
) -> CompareRecord:
    return run_compare(Candidate(old, "old"), Candidate(new, "new"), probe or tiny_probe(), settings)


@torch.no_grad()
def _fine_tuned(old: nn.Module, seed: int = 0) -> nn.Module:
    """Return a copy in which every tensor has moved, each block by another amount."""
    new, generator = copy.deepcopy(old), torch.Generator().manual_seed(seed)
    for place, p in enumerate(new.parameters()):
        p.add_(0.02 * (1 + place % 5) * p.std() * torch.randn(p.shape, generator=generator))
    return new


def _with_block(base: nn.Module, other: nn.Module, *blocks: int) -> nn.Module:
    mixed = copy.deepcopy(base)
    for block in blocks:
        mixed.model.layers[block].load_state_dict(other.model.layers[block].state_dict())
    return mixed


def _mean(model: nn.Module, probe: Probe) -> float:
    rows = probe.report.rows()
    return float(slow_losses(model, rows).sum()) / sum(len(row) - 1 for row in rows)


def test_every_effect_is_that_of_models_put_together_by_hand() -> None:
    old = ZOO["llama"]()
    new, probe = _fine_tuned(old), tiny_probe()
    before = Snapshot.of(old), Snapshot.of(new)
    record = _compare(old, new, probe=probe)
    before[0].assert_unchanged(old)
    before[1].assert_unchanged(new)
    losses = _mean(old, probe), _mean(new, probe)
    assert (record.loss.old, record.loss.new) == pytest.approx(losses, abs=1e-5)
    for block in record.blocks:
        repaired, broken = _with_block(new, old, block.index), _with_block(old, new, block.index)
        assert block.repairs_nats.mean == pytest.approx(losses[1] - _mean(repaired, probe), abs=1e-5)
        assert block.breaks_nats.mean == pytest.approx(_mean(broken, probe) - losses[0], abs=1e-5)
    embedding, norm, head = record.ends
    for end, names in ((embedding, ("model.embed_tokens",)), (norm, ("model.norm",)), (head, ("lm_head",))):
        mixed = copy.deepcopy(new)
        for name in names:
            mixed.get_submodule(name).load_state_dict(old.get_submodule(name).state_dict())
        assert end.repairs_nats.mean == pytest.approx(losses[1] - _mean(mixed, probe), abs=1e-5)
    assert record.blocks[0].interaction_nats == pytest.approx(
        (record.blocks[0].path_from_first_nats.mean + record.blocks[0].path_from_last_nats.mean) / 2
        - record.blocks[0].repairs_nats.mean
    )


def test_steps_of_both_ways_add_up_and_are_those_of_whole_models() -> None:
    old, probe = ZOO["llama"](), tiny_probe()
    new = _fine_tuned(old)
    record = _compare(old, new, probe=probe)
    parts = (record.ends[0], *record.blocks, *record.ends[1:])
    for way in ("path_from_first_nats", "path_from_last_nats"):
        assert sum(getattr(part, way).mean for part in parts) == pytest.approx(record.loss.damage.mean, abs=1e-9)
    assert record.loss.interaction == pytest.approx(
        record.loss.damage.mean - sum(part.repairs_nats.mean for part in parts)
    )
    # The step of block 1 from the first on: embedding and block 0 are OLD's already.
    mixed = _with_block(new, old, 0)
    mixed.model.embed_tokens.load_state_dict(old.model.embed_tokens.state_dict())
    step = _mean(mixed, probe) - _mean(_with_block(mixed, old, 1), probe)
    assert record.blocks[1].path_from_first_nats.mean == pytest.approx(step, abs=1e-5)


def test_layers_are_put_back_one_by_one() -> None:
    old, probe = ZOO["llama"](), tiny_probe()
    new = _fine_tuned(old)
    record = _compare(old, new, probe=probe)
    measured = 0
    for tensor in record.blocks[2].tensors:
        mixed = copy.deepcopy(new)
        name = f"model.layers.2.{tensor.name}"
        with torch.no_grad():
            mixed.get_parameter(name).copy_(old.get_parameter(name))
        assert tensor.repairs_nats.mean == pytest.approx(record.loss.new - _mean(mixed, probe), abs=1e-5)
        measured += 1
    assert measured == 9
    few = _compare(old, new, CompareSettings(layers_of=1, path=False))
    assert sum(any(t.repairs_nats for t in block.tensors) for block in few.blocks) == 1
    assert all(block.path_from_first_nats is None for block in few.blocks)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "neox-parallel", "gemma2", "qwen3", "opt", "plain"])
def test_one_changed_block_is_named_in_every_architecture_and_no_other(name: str) -> None:
    old = ZOO[name]()
    new = copy.deepcopy(old)
    module = find_blocks(new)[1].module
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)
    record = _compare(old, new)
    assert record.conclusion.changed == (1,)
    assert (record.first_difference.unit, record.first_difference.block) == ("block", 1)
    assert record.first_difference.cause == "weights"
    assert record.blocks[1].kind_of_change == "scale"
    assert record.blocks[1].same_code
    assert record.blocks[1].repairs_nats.mean == pytest.approx(record.loss.damage.mean, abs=1e-6)
    for part in (record.blocks[0], record.blocks[2], *record.ends):
        assert part.kind_of_change == "unchanged"
        assert part.repairs_nats.mean == part.breaks_nats.mean == 0


def test_a_trained_model_with_a_known_fault(small_gpt, training_probe) -> None:
    old, _ = small_gpt("final")
    record = _compare(old, damage.sign_flip(old, 3), CompareSettings(), part_of(training_probe, fit=2, report=16))
    assert record.conclusion.case == "worse"
    assert record.conclusion.hurt == record.conclusion.changed == (3,)
    assert record.blocks[3].kind_of_change == "sign"
    assert [t.name for t in record.blocks[3].tensors if t.repairs_nats] == [
        "self_attn.o_proj.weight",
        "mlp.down_proj.weight",
    ]
    better = _compare(damage.sign_flip(old, 3), old, CompareSettings(), part_of(training_probe, fit=2, report=16))
    assert better.conclusion.case == "better"
    assert better.conclusion.helped == (3,)  # control: the same two models the other way round
    assert not better.conclusion.hurt


def test_equal_weights_that_compute_something_else_are_not_the_weights_fault() -> None:
    old = ZOO["llama"]()
    new = copy.deepcopy(old)
    new.model.layers[1].input_layernorm.variance_epsilon = 1.0
    record = _compare(old, new)
    assert record.blocks[1].kind_of_change == "config-or-code"
    assert record.blocks[1].same_weights
    assert record.conclusion.unexplained == (1,)
    assert record.first_difference.cause == "config-or-code"
    both = _fine_tuned(old)  # weights differ everywhere, code in one block
    both.model.layers[2].input_layernorm.variance_epsilon = 1.0
    record = _compare(old, both)
    assert record.conclusion.unexplained == (2,)
    assert record.blocks[2].kind_of_change != "config-or-code"
    assert _compare(old, _fine_tuned(old)).conclusion.unexplained == ()  # control


def test_a_wrong_rotary_base_is_in_every_block() -> None:
    old = ZOO["llama"]()
    new = copy.deepcopy(old)
    new.model.rotary_emb.inv_freq.mul_(0.5)
    record = _compare(old, new)
    assert record.conclusion.unexplained == (0, 1, 2)
    assert {block.kind_of_change for block in record.blocks} == {"config-or-code"}
    assert record.ends[0].kind_of_change == record.ends[2].kind_of_change == "unchanged"
    steps = [block.path_from_first_nats.mean for block in record.blocks]
    assert sum(steps) == pytest.approx(record.loss.damage.mean, abs=1e-9)


def test_identical_copies_and_copies_of_the_same_function() -> None:
    old = ZOO["llama"]()
    record = _compare(old, copy.deepcopy(old))
    assert record.conclusion.case == "identical"
    assert record.conclusion.changed == ()
    assert record.first_difference is None
    assert record.loss.interaction == 0
    same = copy.deepcopy(old)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    mlp = same.model.layers[1].mlp
    with torch.no_grad():
        for layer in (mlp.gate_proj, mlp.up_proj):
            layer.weight.copy_(layer.weight[order])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
    record = _compare(old, same)
    assert record.conclusion.case == "same-function"
    assert record.blocks[1].kind_of_change == "permutation"
    assert record.first_difference is None


class _WithLoRA(nn.Module):
    """A linear layer with a low-rank update beside it that is not merged."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(rank)
        self.base_layer = layer
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        with torch.no_grad():
            for part in (self.down, self.up):
                part.weight.copy_(0.3 * torch.randn(part.weight.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def test_an_update_of_low_rank_merged_or_not() -> None:
    old = ZOO["llama"]()
    beside, merged = copy.deepcopy(old), copy.deepcopy(old)
    lora = _WithLoRA(beside.model.layers[1].mlp.up_proj, rank=4)
    beside.model.layers[1].mlp.up_proj = lora
    with torch.no_grad():
        merged.model.layers[1].mlp.up_proj.weight.add_(lora.up.weight @ lora.down.weight)
    for new in (beside, merged):
        record = _compare(old, new)
        assert record.conclusion.changed == (1,)
        changed = [t for t in record.blocks[1].tensors if t.kind_of_change != "unchanged"]
        assert [(t.name, t.kind_of_change, t.kind_values) for t in changed] == [
            ("mlp.up_proj.weight", "low-rank", {"rank": 4})
        ]
        assert changed[0].repairs_nats.mean == pytest.approx(record.loss.damage.mean, abs=1e-5)
    assert _compare(beside, merged).conclusion.case in ("identical", "same-function")


def test_quantised_layers_against_their_parent() -> None:
    old = ZOO["llama"]()
    new = copy.deepcopy(old)
    quantize_(new, "int3:group=16")
    record = _compare(old, new)
    assert record.conclusion.changed
    assert all(block.kind_of_change == "lattice" for block in record.blocks)
    assert all(block.repairs_nats and block.breaks_nats for block in record.blocks)
    assert record.ends[0].kind_of_change == "unchanged"


def test_a_budget_that_ends_says_what_is_missing() -> None:
    old = ZOO["llama"]()
    record = _compare(old, _fine_tuned(old), CompareSettings(budget=1e-6))
    assert not record.complete
    assert [n.code for n in record.notes] == ["budget-ended"]
    assert all(block.repairs_nats is None for block in record.blocks)
    assert record.loss.interaction is None
    assert CompareRecord.model_validate_json(record.to_json()) == record
    assert json.loads(record.to_json())["blocks"][0]["kind_of_change"] in ("noise", "other")


def test_bad_input_is_one_line() -> None:
    old = ZOO["llama"]()
    with pytest.raises(ModelError, match="one and the same module"):
        _compare(old, old)
    shared = copy.deepcopy(old)
    shared.model.norm = old.model.norm
    assert [(n.code, n.values) for n in _compare(old, shared).notes] == [("shared-tensors", {"count": 1})]
    shorter = copy.deepcopy(old)
    del shorter.model.layers[2]
    with pytest.raises(ModelError, match="OLD has 3 blocks, NEW has 2"):
        _compare(old, shorter)
    with pytest.raises(ModelError, match=r"OLD has no attn\.c_attn\.bias"):
        _compare(old, ZOO["gpt2"]())
    wider = copy.deepcopy(old)
    wider.model.layers[0].mlp.up_proj = nn.Linear(48, 81, bias=False)
    with pytest.raises(ModelError, match=r"mlp.up_proj.weight is \(80, 48\) in OLD and \(81, 48\) in NEW"):
        _compare(old, wider)
    words = copy.deepcopy(old)
    words.resize_token_embeddings(99)
    with pytest.raises(ModelError, match=r"OLD \(old\) knows 97 tokens, NEW \(new\) 99"):
        _compare(old, words)
    with pytest.raises(OptionError, match="margin"):
        CompareSettings(margin=0.0)
