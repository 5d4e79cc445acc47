"""One pass forward and back against autograd on a model whose parts are really scaled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from peelwise.engine.depth import backward, forward
from peelwise.engine.depth.joint import marginal_evidence
from peelwise.engine.depth.passes import Seen, observe
from peelwise.engine.depth.table import block_weights, joined, pass_table, weight_table
from peelwise.model.architectures import find_blocks
from peelwise.model.parts import Parts, parts_of
from peelwise.model.runner import Runner
from peelwise.model.trace import Trace
from peelwise.probe.rows import Split

LAYERS = 6
DEEP = 1e-4  # of two ways to differentiate in float32


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    made = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return made


@pytest.fixture(scope="module")
def split() -> Split:
    ids = torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(2))
    return Split(ids, torch.ones_like(ids, dtype=torch.bool))


@pytest.fixture(scope="module")
def seen(model: Any, split: Split) -> tuple[Trace, dict[int, tuple[Parts, Seen]]]:
    runner = Runner(model, find_blocks(model), micro_batch_tokens=32)  # two micro-batches: sums must add up
    trace = runner.trace(split)
    parts = [parts_of(block) for block in runner.blocks]
    return trace, {p.block.index: (p, s) for p, s in observe(runner, parts, trace)}


@contextmanager
def scaled(module: nn.Module, scale: Tensor) -> Iterator[None]:
    """Multiply what a module gives."""

    def after(_: nn.Module, __: Any, y: Any) -> Any:
        return (y[0] * scale, *y[1:]) if isinstance(y, tuple) else y * scale

    handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def loss_of(model: Any, split: Split) -> Tensor:
    logits = model(split.ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), split.ids[:, 1:].flatten())


def slow_slope(model: Any, split: Split, module: nn.Module, width: int = 1) -> Tensor:
    """Differentiate the loss by scales on a module's output."""
    scale = torch.ones(width, requires_grad=True)
    with scaled(module, scale):
        return torch.autograd.grad(loss_of(model, split), scale)[0]


@pytest.mark.parametrize("index", [0, 3, LAYERS - 1])
def test_gain_slopes_are_derivatives_by_a_scale(model: Any, split: Split, seen: Any, index: int) -> None:
    parts, found = seen[1][index]
    modules = {name: linear.module for name, linear in parts.linears.items()}
    modules |= parts.norms | {branch.name: branch.module for branch in parts.branches}
    assert set(modules) < set(found.backward)
    for name, module in modules.items():
        slope = backward.gain_slope(found.backward[name])
        assert slope == pytest.approx(float(slow_slope(model, split, module)), rel=DEEP, abs=1e-6), name


def test_identities_of_slopes(seen: Any) -> None:
    for parts, found in seen[1].values():
        slope = {name: backward.gain_slope(part) for name, part in found.backward.items()}
        assert slope["self_attn.v_proj"] == pytest.approx(slope["self_attn.o_proj"], rel=1e-3, abs=1e-6)
        assert slope["mlp.up_proj"] == pytest.approx(slope["mlp.down_proj"], rel=1e-3, abs=1e-6)
        assert slope["self_attn.q_proj"] == pytest.approx(slope["self_attn.k_proj"], rel=1e-3, abs=1e-6)
        assert slope["attention"] == pytest.approx(slope["self_attn.o_proj"], rel=1e-6)
        assert parts.branches[0].name == "attention"


def test_a_small_part_less_costs_what_the_slope_says(model: Any, split: Split, seen: Any) -> None:
    """The slope of an update is the first-order estimate of minus what skipping it costs."""
    parts, found = seen[1][2]
    share = 0.01
    with torch.no_grad(), scaled(parts.branches[1].module, torch.tensor(1 - share)):
        less = float(loss_of(model, split))
    with torch.no_grad():
        whole = float(loss_of(model, split))
    assert (less - whole) / share == pytest.approx(-backward.gain_slope(found.backward["mlp"]), rel=0.05)


def token_products(model: Any, split: Split, module: nn.Module) -> Tensor:
    """Return ``g y`` of every token and channel ``[n, d]``, one token's loss at a time."""
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, y: kept.append(y))
    logits = model(split.ids[:, :-1], use_cache=False).logits
    handle.remove()
    losses = F.cross_entropy(logits.flatten(0, 1), split.ids[:, 1:].flatten(), reduction="none")
    g = torch.autograd.grad(losses.sum(), kept[0])[0]
    return (kept[0].detach() * g).flatten(0, -2)


def test_t_values_and_evidence(model: Any, split: Split, seen: Any) -> None:
    parts, found = seen[1][4]
    module = parts.linears["mlp.down_proj"].module
    products = token_products(model, split, module).double().numpy()
    per_token = products.sum(1)
    n = len(per_token)
    part = found.backward["mlp.down_proj"]
    expected = per_token.mean() / (per_token.std() / math.sqrt(n))
    assert backward.gain_t(part) == pytest.approx(expected, rel=1e-3)
    channels = [products[:, c].sum() ** 2 / (products[:, c] ** 2).sum() for c in range(products.shape[1])]
    assert backward.gain_evidence(part) == pytest.approx(np.mean(channels), rel=1e-3)
    width = module.weight.shape[0]
    assert part.gate.channels is not None
    slopes = part.gate.channels / n
    assert slopes.numpy() == pytest.approx(slow_slope(model, split, module, width).numpy(), rel=1e-3, abs=1e-6)


def test_heads(model: Any, split: Split, seen: Any) -> None:
    parts, found = seen[1][1]
    scale = torch.ones(4, requires_grad=True)
    o = parts.linears["self_attn.o_proj"].module
    handle = o.register_forward_pre_hook(lambda _, args: (args[0] * scale.repeat_interleave(6),))
    expected = torch.autograd.grad(loss_of(model, split), scale)[0]
    handle.remove()
    part = found.backward["attention.inner"]
    assert part.gate.groups(6).numpy() == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-6)
    assert backward.head_slope(part) == pytest.approx(float(expected.abs().max()), rel=1e-3)
    assert backward.head_slope(found.backward["mlp.inner"]) is None


@pytest.mark.parametrize("shape", [(48, 20), (20, 48)])
def test_the_rank_of_a_gradient_counts_no_rounding(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(shape[0], 2, generator=generator), torch.randn(2, shape[1], generator=generator)
    G = left @ right  # of two directions; squares of it in float32 have twenty
    s = np.linalg.svd(G.double().numpy(), compute_uv=False)
    part = backward.Backward(gradient=backward.GradientSums(n=1, cross=G))
    assert backward.gradient_rank(part) == pytest.approx(s.sum() ** 2 / (s**2).sum(), rel=1e-5)


def test_gradients_of_weights(model: Any, split: Split, seen: Any) -> None:
    parts, found = seen[1][2]
    weight = parts.linears["mlp.up_proj"].module.weight
    G = torch.autograd.grad(loss_of(model, split), weight)[0].double()
    part = found.backward["mlp.up_proj"]
    assert backward.weight_gradient_norm(part) == pytest.approx(float(G.norm()), rel=DEEP)
    s = np.linalg.svd(G.numpy(), compute_uv=False)
    assert backward.gradient_rank(part) == pytest.approx(s.sum() ** 2 / (s**2).sum(), rel=1e-2)
    inputs: list[Tensor] = []
    handle = parts.linears["mlp.up_proj"].module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    kept: list[Tensor] = []
    other = parts.linears["mlp.up_proj"].module.register_forward_hook(lambda _, __, y: kept.append(y))
    total = loss_of(model, split) * 48
    g = torch.autograd.grad(total, kept[0])[0].flatten(0, 1).double()
    handle.remove()
    other.remove()
    x = inputs[0].detach().flatten(0, 1).double()
    squares = sum(float(torch.outer(a, b).square().sum()) for a, b in zip(g, x, strict=True))
    along = np.mean([float((torch.outer(a, b) * G).sum() / G.norm()) ** 2 for a, b in zip(g, x, strict=True)])
    assert backward.gradient_sharpness(part) == pytest.approx(along, rel=1e-3)
    assert backward.fisher_trace(part) == pytest.approx(squares / 48, rel=1e-3)
    assert backward.gradient_alignment(part) == pytest.approx(48**2 * float(G.square().sum()) / squares, rel=1e-3)


def test_signals_of_the_stream(model: Any, split: Split, seen: Any) -> None:
    _, found = seen[1][3]
    with torch.no_grad():
        states = model.model(split.ids[:, :-1], output_hidden_states=True, use_cache=False).hidden_states
    earlier, x, z = (states[i].flatten(0, 1).double().numpy() for i in (2, 3, 4))
    stream = found.stream
    assert stream.before.numpy() == pytest.approx(x, rel=1e-4, abs=1e-5)
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, z, strict=True)]
    assert forward.block_influence(stream) == pytest.approx(1 - np.mean(cosines), abs=1e-5)
    assert forward.angular_distance(stream) == pytest.approx(np.mean(np.arccos(cosines)) / math.pi, abs=1e-4)
    u, before = z - x, x - earlier
    both = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(u, before, strict=True)]
    assert forward.successive_cosine(stream) == pytest.approx(np.mean(both), abs=1e-4)
    total = stream.updates["attention"] + stream.updates["mlp"]
    assert total.numpy() == pytest.approx(u, abs=1e-3)
    size = math.sqrt((stream.updates["mlp"].double().numpy() ** 2).sum() / (x**2).sum())
    assert forward.update_ratio(stream, stream.updates["mlp"]) == pytest.approx(size, rel=1e-4)
    kurtosis = np.mean([(row**4).mean() / (row**2).mean() ** 2 for row in u])
    assert forward.stream_kurtosis(stream) == pytest.approx(kurtosis, rel=1e-3)
    xc, zc, uc = x - x.mean(0), z - z.mean(0), u - u.mean(0)
    cka = np.linalg.norm(xc.T @ zc) ** 2 / np.linalg.norm(xc.T @ xc) / np.linalg.norm(zc.T @ zc)
    assert forward.linear_cka(stream) == pytest.approx(cka, rel=1e-3)
    fits = [np.polyval(np.polyfit(x[:, j], u[:, j], 1), x[:, j]) for j in range(x.shape[1])]
    own = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(u, np.stack(fits, 1), strict=True)]
    assert forward.tokenwise_alignment(stream) == pytest.approx(np.mean(own), abs=1e-4)
    p = np.linalg.svd(uc, compute_uv=False) ** 2
    p = p / p.sum()
    assert forward.station_rank(stream) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-2)


def test_a_linear_block_is_recoverable_and_a_random_one_is_not() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=random)
    A = torch.randn(12, 12, generator=random)
    linear = forward.Stream(x, x + x @ A, {})
    noise = forward.Stream(x, x + torch.randn(400, 12, generator=random), {})
    assert forward.recoverability(linear) > 0.9
    assert forward.recoverability(noise) < 0.1


def test_an_update_of_each_channel_alone_is_tokenwise_and_a_mixture_of_channels_is_not() -> None:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(400, 12, generator=random)
    scaled, mixed = x * torch.randn(12, generator=random), x @ torch.randn(12, 12, generator=random).fill_diagonal_(0)
    assert forward.tokenwise_alignment(forward.Stream(x, x + scaled, {})) > 0.99
    assert abs(forward.tokenwise_alignment(forward.Stream(x, x + mixed, {}))) < 0.3


def test_sharpness_needs_no_more_than_the_first_tokens() -> None:
    random = torch.Generator().manual_seed(4)
    x, g = torch.randn(600, 5, generator=random), torch.randn(600, 3, generator=random) + 1.0
    sums = backward.GradientSums()
    for start in (0, 200, 400):
        sums.update(x[start : start + 200], g[start : start + 200])
    G = g.T @ x
    along = torch.einsum("no,oi,ni->n", g[:256], G / G.norm(), x[:256]).double()
    assert backward.gradient_sharpness(backward.Backward(gradient=sums)) == pytest.approx(
        float(along.square().mean()), rel=1e-5
    )


def test_directions_of_a_deficient_update_are_counted() -> None:
    """In float32 some of the spectrum is exactly 0, and 0 times the logarithm of 0 is no number."""
    random = torch.Generator().manual_seed(5)
    x, few = torch.randn(40, 64, generator=random), torch.randn(3, 64, generator=random)
    update = torch.randn(40, 3, generator=random) @ few
    assert 1 < forward.station_rank(forward.Stream(x, x + update, {})) < 3.001
    assert forward.station_rank(forward.Stream(x, x, {})) == 1  # nothing is added


def test_attention_is_what_eager_attention_computes(model: Any, split: Split, seen: Any) -> None:
    model.config._attn_implementation = "eager"
    try:
        with torch.no_grad():
            weights = model(split.ids[:1, :-1], output_attentions=True, use_cache=False).attentions[2]
    finally:
        model.config._attn_implementation = "sdpa"
    p = weights[0, :, 1:].double().numpy()  # [heads, tokens - 1, keys]
    entropies = [
        -sum(v * math.log(v) for v in row if v > 0) / math.log(t + 2) for head in p for t, row in enumerate(head)
    ]
    stream = seen[1][2][1].stream
    assert forward.attention_entropy(stream) == pytest.approx(np.mean(entropies), abs=1e-4)
    assert forward.attention_sink(stream) == pytest.approx(p[..., 0].mean(), abs=1e-4)


def test_tables_hold_every_signal_for_every_block_and_without_gradients_those_of_a_forward_pass(
    model: Any, split: Split
) -> None:
    runner = Runner(model, find_blocks(model))
    parts = [parts_of(block) for block in runner.blocks]
    trace = runner.trace(split)
    with torch.no_grad():
        forward_only = pass_table(runner, parts, trace, gradients=False)
        whole = pass_table(runner, parts, trace)
    assert {signal for signal, _ in forward_only.values} < {signal for signal, _ in whole.values}
    assert whole.values["update_ratio", "mlp"] == pytest.approx(forward_only.values["update_ratio", "mlp"], rel=1e-5)
    table = joined(weight_table([block_weights(p, 24) for p in parts]), whole)
    missing = {key for key, row in table.values.items() if None in row}
    assert missing == {("successive_cosine", "")}  # the first block has none before it
    assert all(parameter.grad is None for parameter in model.parameters())


def test_marginal_evidence_is_what_is_lost_without_a_block() -> None:
    random = torch.Generator().manual_seed(4)
    products = {block: torch.randn(300, 3, generator=random) + 0.1 * block for block in range(4)}
    found = marginal_evidence(products, damping=0.5)

    def energy(blocks: list[int]) -> float:
        X = torch.cat([products[block] for block in blocks], dim=1).double().numpy()
        size = np.sqrt((X**2).mean(0))
        F = X.T @ X / len(X) / np.outer(size, size) + 0.5 * np.eye(X.shape[1])
        s = X.mean(0) / size
        return float(len(X) * s @ np.linalg.solve(F, s))

    for block in range(4):
        without = [other for other in range(4) if other != block]
        assert found[block] == pytest.approx((energy([0, 1, 2, 3]) - energy(without)) / 3, rel=1e-6)


def test_a_block_that_only_follows_another_has_no_evidence_of_its_own() -> None:
    random = torch.Generator().manual_seed(6)
    cause = torch.randn(2000, 2, generator=random) + 0.3
    follows = cause + 0.05 * torch.randn(2000, 2, generator=random)
    bystander = torch.randn(2000, 2, generator=random)
    found = marginal_evidence({0: cause, 1: follows, 2: bystander}, damping=0.01)
    alone = marginal_evidence({1: follows}, damping=0.01)
    assert found[1] < 0.05 * alone[1]
    assert found[2] < 5


def test_rows_are_those_of_the_tokens_where_the_hidden_state_has_the_tokens_first(split: Split) -> None:
    """XLNet's is ``[t, b, d]``."""
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=61, d_model=24, n_layer=5, n_head=4, d_inner=40, attn_type="uni")
    made = transformers.XLNetLMHeadModel(config).eval()
    runner = Runner(made, find_blocks(made))
    trace = runner.trace(split)
    trace.batches[0].read[1, 3:] = False  # as if they were padding
    read = trace.batches[0].read
    with torch.no_grad():
        states = made(split.inputs, output_hidden_states=True).hidden_states
    parts = [parts_of(block) for block in runner.blocks]
    for p, seen in observe(runner, parts, trace):
        both = (seen.stream.before, states[p.block.index]), (seen.stream.after, states[p.block.index + 1])
        for rows, state in both:
            state = state if state.shape[:2] == read.shape else state.transpose(0, 1)
            assert torch.allclose(rows, state[read], atol=1e-5)
        assert "ff.layer_1" in seen.backward
        assert seen.backward["ff.layer_1"].gate.per_token[0].shape[0] == int(read.sum())
