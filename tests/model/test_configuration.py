"""The fingerprint knows what a model computes with besides its saved tensors, and nothing that makes no difference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peelwise.model.checkpoints import open_model
from peelwise.model.configuration import configuration, other_configuration
from peelwise.model.fingerprint import fingerprint, identify, tensors_sha256
from zoo import ZOO, sample_ids


def rebuilt(model, **changed):
    """Return the same tensors under a configuration of which some entries were changed."""
    config = copy.deepcopy(model.config)
    for name, value in changed.items():
        setattr(config, name, value)
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


CHANGES = {
    "rotary base": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "epsilon": {"rms_norm_eps": 1e-3},
    "activation": {"hidden_act": "gelu"},
    "heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24},
}


@pytest.mark.parametrize("name", CHANGES)
def test_genuine_tensors_under_another_configuration_are_another_model(name):
    model = ZOO["llama"]()
    other = rebuilt(model, **CHANGES[name])
    ids = sample_ids()
    assert not torch.allclose(model(ids).logits, other(ids).logits, atol=1e-4)
    assert tensors_sha256(other) == tensors_sha256(model)
    assert fingerprint(other) != fingerprint(model)
    said = other_configuration(configuration(model), configuration(other))
    assert said is not None
    assert any(key in said for key in (*CHANGES[name], "rope_theta", "inv_freq"))


def test_what_changes_no_logit_changes_no_fingerprint():
    model = ZOO["llama"]()
    other = rebuilt(model, attention_dropout=0.3, use_cache=False, initializer_range=0.5, name_or_path="elsewhere")
    assert identify(other) == identify(model)
    assert fingerprint(rebuilt(model)) == fingerprint(model)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_saved_model_is_the_same_when_it_is_opened(name, tmp_path):
    model = ZOO[name]()
    if not hasattr(model, "save_pretrained"):
        pytest.skip("plain PyTorch: it has no file of its own")
    model.save_pretrained(tmp_path)
    opened = open_model(tmp_path, with_tokenizer=False).model
    assert other_configuration(configuration(model), configuration(opened)) is None
    assert fingerprint(opened) == fingerprint(model)


class Scaled(nn.Module):
    """A module whose function depends on a number, a function and an unsaved buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.GELU(), nn.Dropout(0.1)) for _ in range(3))
        self.scale, self.act, self.kind = 2.0, torch.relu, "post"
        self.register_buffer("table", torch.linspace(0.5, 3.0, 12).reshape(3, 4), persistent=False)
        self.register_buffer("kept", torch.ones(2))


def eps(m):
    m.inner[1][0].eps = 1e-3


OTHERS = {
    "a number": lambda m: setattr(m, "scale", 2.5),
    "a function": lambda m: setattr(m, "act", torch.tanh),
    "a word": lambda m: setattr(m, "kind", "pre"),
    "one epsilon": eps,
    "an activation": lambda m: m.inner[2].__setitem__(1, nn.SiLU()),
    "a buffer's size": lambda m: m.table.mul_(1.1),
    "a buffer's order": lambda m: m.table.copy_(m.table.flip(0)),
    "a buffer's shape": lambda m: setattr(m, "table", m.table.T),
    "a mask": lambda m: m.table[0, 1].fill_(float("-inf")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_module_without_a_configuration_is_known_by_its_attributes_and_buffers(name):
    model, other = Scaled(), Scaled()
    assert identify(other) == identify(model)
    OTHERS[name](other)
    assert tensors_sha256(other) == tensors_sha256(model)
    assert fingerprint(other) != fingerprint(model)
    assert other_configuration(configuration(model), configuration(other)) is not None


def test_dropout_training_and_last_digits_make_no_difference():
    model, other = Scaled(), Scaled()
    other.train()
    other.inner[0][2].p = 0.7
    other.forward = lambda x: x  # what hooks of others replace
    other.table.mul_(1 + 2e-7)
    assert identify(other) == identify(model)


def test_what_is_alike_in_every_block_stands_once():
    found = configuration(Scaled())
    assert found["inner.*.*.eps"] == 1e-5
    assert len([name for name in found if "eps" in name]) == 1


def test_figures_of_a_buffer():
    """Slow and obvious: mean size, and how far from the first to the last entry it lies."""
    module = Scaled()
    values = [float(v) for v in module.table.flatten()]
    found = configuration(module)
    assert found["buffer table mean size"] == pytest.approx(sum(map(abs, values)) / 12, rel=1e-3)
    middle = sum(place / 12 * v for place, v in enumerate(values)) / sum(map(abs, values))
    assert found["buffer table middle"] == pytest.approx(middle, abs=1e-3)
    assert found["buffer table shape"] == "[3, 4]"
    module.table = torch.complex(module.table, -module.table)
    assert configuration(module)["buffer table mean size"] == found["buffer table mean size"]


def test_only_what_both_have_is_compared():
    """Versions of transformers add entries and drop them."""
    assert other_configuration({"a": 1, "old": 2}, {"a": 1, "new": 3}) is None
    assert other_configuration({"a": 1}, {"a": 2}) == "a is 2, 1 was certified"
    assert other_configuration({"buffer t mean size": 1.0}, {"buffer t mean size": 1.001}) is None
    assert other_configuration({"buffer t mean size": 1.0}, {"buffer t mean size": 1.01}) is not None
