"""XLNet's hidden state is ``[tokens, batch, width]``: every command measures it or says that it does not."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import peelwise
from audits import tiny_probe
from peelwise.errors import UnsupportedModelError
from zoo import VOCABULARY


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.XLNetConfig(
        vocab_size=VOCABULARY, d_model=32, n_layer=5, n_head=4, d_inner=48, attn_type="uni"
    )
    made = transformers.XLNetLMHeadModel(config).eval()
    with torch.no_grad():  # large enough that every block matters
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.3) if parameter.dim() > 1 else None
    return made


def test_a_comparison_names_the_layer_that_was_changed(model: nn.Module) -> None:
    new = copy.deepcopy(model)
    with torch.no_grad():
        new.transformer.layer[2].ff.layer_1.weight.mul_(1.2)
    record = peelwise.compare(model, new, tiny_probe(), peelwise.CompareSettings("60s")).record
    assert record.conclusion.changed == (2,)
    assert record.first_difference.block == 2
    assert [block.index for block in record.blocks if block.output_distance > 1e-4] == [2]


def test_codes_are_found_and_cost_no_more_than_rounding(model: nn.Module) -> None:
    record = peelwise.quantise(model, tiny_probe(), peelwise.QuantiseSettings("int2:channel")).record
    assert len(record.layers) == 10
    assert record.loss.damage.mean < 0.8 * record.loss.rounding_damage.mean


def test_peeling_says_why_it_does_not(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match=r"is \[tokens, batch, width\]"):
        peelwise.peel(model, tiny_probe())
