"""Which modules are audited, and what is said about models that cannot be."""

import pytest
import torch
from torch import nn

from peelwise.errors import UnsupportedModelError
from peelwise.model.architectures import find_blocks, find_head, refuse_text
from peelwise.model.layers import is_linear, parameter_count, unwrapped, vocabulary_size
from plain_gpt import PlainGPT
from zoo import BLOCKS, UNSUPPORTED, VOCABULARY, ZOO, sample_ids


class Stack(nn.Module):
    """A model whose blocks are whatever the test puts in."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 8)
        self.blocks = nn.ModuleList(blocks)


class Experts(nn.Module):
    """Experts under a name that gives nothing away: one parameter with three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.weights = nn.Parameter(torch.zeros(4, 8, 8))


class Quiet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)


REFUSED = {
    **{name: (factory, words) for (name, factory), words in zip(
        UNSUPPORTED.items(),
        [
            ("Not yet", "Conv1d"),
            ("Not yet", "LSTM"),
            ("encoder-decoder", "decoder.block", "T5ForConditionalGeneration"),
        ],
        strict=True,
    )},
    "bare MLP": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
        ("looked for an nn.ModuleList", "Linear, ReLU"),
    ),
    "nothing": (lambda: nn.Module(), ("looked for an nn.ModuleList",)),
    "no linear map": (lambda: Stack(Quiet(), Quiet()), ("looked for", "LayerNorm")),
}  # fmt: skip


def blocks_for_text(model):
    refuse_text(model)
    return find_blocks(model)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_what_was_found(name):
    factory, words = REFUSED[name]
    model = factory()
    with pytest.raises(UnsupportedModelError) as error:
        blocks_for_text(model)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", ZOO)
def test_blocks_hold_every_linear_map_once_in_order(name):
    model = ZOO[name]()
    blocks = find_blocks(model)
    modules = dict(model.named_modules())
    assert [block.index for block in blocks] == list(range(BLOCKS))
    for block in blocks:
        assert modules[block.name] is block.module
        expected = [n for n, m in modules.items() if n.startswith(f"{block.name}.") and is_linear(m)]
        assert [linear.name for linear in block.linears if not linear.is_expert] == expected
        assert len(block.linears) >= 4
        stacks = [
            (n, p) for n, p in model.named_parameters() if n.startswith(f"{block.name}.mlp.experts") and p.dim() == 3
        ]
        experts = [f"{n}.{index}" for n, p in stacks for index in range(len(p))]
        assert [linear.name for linear in block.linears if linear.is_expert] == experts


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "plain"])
def test_weight_and_bias_are_those_of_the_product(name):
    for block in find_blocks(ZOO[name]()):
        for linear in block.linears:
            x = torch.randn(5, linear.weight().shape[1], generator=torch.Generator().manual_seed(0))
            y = x @ linear.weight().T
            if linear.has_bias:
                y = y + linear.bias()
            torch.testing.assert_close(linear.module(x), y)


def test_only_conv1d_is_transposed():
    assert all(m.transposed and m.has_bias for b in find_blocks(ZOO["gpt2"]()) for m in b.linears)
    assert not any(m.transposed or m.has_bias for b in find_blocks(ZOO["llama"]()) for m in b.linears)


OTHER_PARTS = {
    "parameter of three dimensions": lambda: Experts(),
    "convolution": lambda: nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 3)),
    "recurrence": lambda: nn.Sequential(nn.Linear(8, 8), nn.GRU(8, 8)),
}


@pytest.mark.parametrize("name", OTHER_PARTS)
def test_what_is_no_linear_layer_stands_beside_those_that_are(name):
    model = Stack(*(OTHER_PARTS[name]() for _ in range(2)))
    assert [len(block.linears) for block in find_blocks(model)] == [1, 1]


def test_blocks_may_be_of_several_classes_and_hold_no_linear_layer():
    model = Stack(nn.Sequential(nn.Linear(8, 8)), Quiet(), Experts())
    assert [len(block.linears) for block in find_blocks(model)] == [1, 0, 1]


@pytest.mark.parametrize("name", ZOO)
def test_head_and_vocabulary(name):
    model = ZOO[name]()
    head = find_head(model, find_blocks(model))
    assert head is (model.head if hasattr(model, "head") else model.get_output_embeddings())
    assert vocabulary_size(model) == VOCABULARY


def test_model_without_a_head_has_none():
    model = PlainGPT()
    model.head = nn.Identity()
    assert find_head(model, find_blocks(model)) is None


def test_the_largest_list_is_taken():
    model = PlainGPT()
    model.adapters = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))
    assert [block.name for block in find_blocks(model)] == [f"blocks.{i}" for i in range(BLOCKS)]


def test_tied_parameters_count_once():
    model = ZOO["llama-tied"]()
    assert parameter_count(model) == parameter_count(ZOO["llama"]()) - model.lm_head.weight.numel()


def test_names_do_not_tell_that_a_model_is_compiled():
    model = ZOO["llama"]()
    names = [linear.name for block in find_blocks(model) for linear in block.linears]
    whole = torch.compile(model, backend="eager")
    assert unwrapped(whole) is model
    assert [linear.name for block in find_blocks(whole) for linear in block.linears] == names
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    assert [linear.name for block in find_blocks(model) for linear in block.linears] == names
    assert model(sample_ids()).logits.isfinite().all()
