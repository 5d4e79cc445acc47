"""Witnesses in the middle of a training: what they change, and that it can be taken back."""

import copy

import pytest
import torch

from peelwise.act import apply_witness_
from peelwise.errors import OptionError
from plain_gpt import PlainGPT

from .test_schedule import loss_of, same, train, weights

LAYER, PLAIN = "blocks.1.feed_forward.2", "blocks.0.attention.qkv"


def trained(kind=torch.optim.AdamW):
    torch.manual_seed(0)
    model = PlainGPT()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.01, **options)
    train(model, optimizer, None, range(3))
    return model, optimizer


def witness(model, scale=0.01):
    generator = torch.Generator().manual_seed(4)
    shapes = {name: model.get_submodule(name).weight.shape for name in (LAYER, PLAIN)}
    return {name: scale * torch.randn(d_out, d_in + 1, generator=generator) for name, (d_out, d_in) in shapes.items()}


@pytest.mark.parametrize("prefixed", [False, True])
def test_weights_and_biases_are_added(prefixed):
    model, optimizer = trained()
    before, change = weights(model), witness(model)
    given = {f"composed/{name}": d for name, d in change.items()} | {f"block-1/{LAYER}": change[LAYER] * 9}
    applied = apply_witness_(model, given if prefixed else change, optimizer, scale=0.5)
    for name, value in weights(model).items():
        layer, kind = name.rsplit(".", 1)
        extra = 0.0
        if layer in change:
            extra = 0.5 * (change[layer][:, -1] if kind == "bias" else change[layer][:, :-1])
        assert torch.equal(value, before[name] + extra), name
    assert set(applied.names) == {f"{name}.{kind}" for name in (LAYER, PLAIN) for kind in ("weight", "bias")}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("moments", ["first", "all", "keep"])
def test_it_is_taken_back_to_the_bit_with_its_moments(kind, moments):
    model, optimizer = trained(kind)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    applied = apply_witness_(model, witness(model), optimizer, moments=moments)
    assert not same(weights(model), before)
    assert applied.revert() is True
    assert same(weights(model), before)
    for index, kept in optimizer.state_dict()["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(state[index][k])) for k, v in kept.items())
    applied.revert()
    assert same(weights(model), before)


def test_which_moments_are_cleared():
    for moments, cleared in (("first", {"exp_avg"}), ("all", {"exp_avg", "exp_avg_sq", "step"}), ("keep", set())):
        model, optimizer = trained()
        apply_witness_(model, witness(model), optimizer, moments=moments)
        touched = model.get_submodule(LAYER).weight
        for name, p in model.named_parameters():
            zero = {key for key, value in optimizer.state[p].items() if not value.any()}
            changed = name.rsplit(".", 1)[0] in (LAYER, PLAIN)
            assert zero == (cleared if changed else set()), (moments, name)
        train(model, optimizer, None, range(3, 5))  # it trains on
        assert torch.isfinite(touched).all()


def test_what_was_learned_meanwhile_stays():
    model, optimizer = trained()
    change = witness(model)
    applied = apply_witness_(model, change, optimizer)
    train(model, optimizer, None, range(3, 6))
    after = weights(model)
    assert applied.revert() is False
    expected = after[f"{LAYER}.weight"] - change[LAYER][:, :-1]
    assert torch.allclose(model.get_submodule(LAYER).weight, expected, atol=1e-6)
    assert torch.equal(weights(model)["head.weight"], after["head.weight"])


def test_a_step_downhill_lowers_the_loss_and_one_uphill_raises_it():
    model, optimizer = trained()
    loss = loss_of(model, 0)
    gradient = torch.autograd.grad(loss, model.get_submodule(LAYER).weight)[0]
    change = {LAYER: torch.cat([-0.1 * gradient, torch.zeros(len(gradient), 1)], dim=1)}
    for scale, sign in ((1.0, -1), (-1.0, 1)):
        applied = apply_witness_(model, change, optimizer, scale=scale)
        assert sign * float((loss_of(model, 0) - loss).detach()) > 0
        applied.revert()


def test_layers_that_keep_their_weight_the_other_way_round():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=50))
    name = "transformer.h.1.mlp.c_fc"
    layer = model.get_submodule(name)
    change, x = torch.randn(32, 9), torch.randn(3, 8)
    before = layer(x)
    apply_witness_(model, {name: change})
    assert torch.allclose(layer(x), before + x @ change[:, :-1].T + change[:, -1], atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w | {"blocks.9.out": w[LAYER]}, r"changes blocks\.9\.out, and the model has no linear layer"),
        (lambda w: w | {LAYER: w[LAYER][:, :-1]}, r"is \(48, 192\), expected \(48, 193\)"),
        (lambda w: w | {LAYER: w[LAYER] * float("nan")}, "holds NaN or Inf"),
        (lambda w: {}, "empty: nothing would be changed"),
        (lambda w: {f"block-0/{LAYER}": w[LAYER]}, "no part 'composed'; it has block-0"),
        (lambda w: {f"composed/{LAYER}.codes": w[LAYER]}, "low-bit layers: codes"),
    ],
)
def test_what_is_refused_leaves_the_model_as_it_was(spoil, message):
    model, optimizer = trained()
    before = weights(model)
    with pytest.raises(OptionError, match=message):
        apply_witness_(model, spoil(witness(model)), optimizer)
    assert same(weights(model), before)


def test_moments_that_do_not_exist_are_refused():
    model, optimizer = trained()
    with pytest.raises(OptionError, match='expected "first", "all" or "keep"'):
        apply_witness_(model, witness(model), optimizer, moments="second")
