"""Every study of an anatomy against the same thing done by hand on a copy of the model."""

import copy
import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy

from audits import tiny_probe
from peelwise.engine.opening import checked_blocks, open_session
from peelwise.model.guard import untouched
from peelwise.model.parts import parts_of
from peelwise.records.anatomy import ABLATIONS, BENDS
from peelwise.tasks.anatomy import recover
from peelwise.tasks.anatomy.ablate import ablations
from peelwise.tasks.anatomy.bend import STRENGTHS, bent, best_scale, changer
from peelwise.tasks.anatomy.predict import Grams, coefficients, deltas, explained, grams_of, kinds, predictability
from peelwise.tasks.anatomy.predict import predicted as predictions
from peelwise.tasks.anatomy.recover import recovery
from plain_gpt import PlainGPT
from tiny_llama import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::peelwise.errors.IllConditionedWarning")
PROBE = tiny_probe()


def model_of(kind):
    torch.manual_seed(0)
    model = PlainGPT(blocks=4) if kind == "plain" else tiny_llama()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0 if p.dim() > 1 else 1.0)  # blocks that do something
    return model.eval()


@pytest.fixture(params=["plain", "llama"])
def opened(request):
    model = model_of(request.param)
    blocks = checked_blocks(model, PROBE)
    with untouched(model), torch.no_grad():
        session = open_session(model, blocks, PROBE, name="m", budget_seconds=1e9, micro_batch_tokens=64, watcher=None)
        yield model, session, [parts_of(block) for block in blocks]


def layers_of(model):
    return model.blocks if isinstance(model, PlainGPT) else model.model.layers


@torch.no_grad()
def loss(model, split):
    out = model(split.inputs)
    logits = getattr(out, "logits", out)
    return float(cross_entropy(logits[split.weights].double(), split.targets[split.weights]))


def cost(model, changed):
    return loss(changed, PROBE.report) - loss(model, PROBE.report)


def with_matrices(model, index, change):
    """Return a copy in which every matrix of a block is replaced by ``change(name, weight)``."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in layers_of(changed)[index].named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(change(name, module.weight))
    return changed


def first(out):
    return out[0] if isinstance(out, tuple) else out


def like(out, hidden):
    return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def test_ablations_are_those_by_hand(opened):
    model, session, all_parts = opened
    found = dict(ablations(session, all_parts, 1))
    assert list(found) == sorted(
        found, key=lambda way: ["skipped", "mean", "attention", "mlp", "neighbours"].index(way)
    )
    assert set(found) == set(ABLATIONS)
    added = []
    block = layers_of(model)[1]
    handle = block.register_forward_hook(lambda m, args, out: added.append(first(out) - args[0]))
    loss(model, PROBE.fit)
    handle.remove()
    mean = torch.cat(added)[PROBE.fit.weights].mean(dim=0)
    for way, hook in (
        ("skipped", lambda m, args, out: like(out, args[0])),
        ("mean", lambda m, args, out: like(out, args[0] + mean)),
    ):
        changed = copy.deepcopy(model)
        layers_of(changed)[1].register_forward_hook(hook)
        assert found[way].mean == pytest.approx(cost(model, changed), abs=1e-5), way
    for way, names in (("attention", ("attention", "self_attn")), ("mlp", ("feed_forward", "mlp"))):
        changed = copy.deepcopy(model)
        part = next(getattr(layers_of(changed)[1], name) for name in names if hasattr(layers_of(changed)[1], name))
        part.register_forward_hook(lambda m, args, out: like(out, torch.zeros_like(first(out))))
        assert found[way].mean == pytest.approx(cost(model, changed), abs=1e-5), way


@pytest.mark.parametrize("index", [0, 1])
def test_the_neighbours_mean_is_that_of_weights_and_biases(opened, index):
    model, session, all_parts = opened
    changed, count = copy.deepcopy(model), len(all_parts)
    beside = [dict(layers_of(model)[i].named_modules()) for i in (index - 1, index + 1) if 0 <= i < count]
    with torch.no_grad():
        for name, module in layers_of(changed)[index].named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(sum(each[name].weight for each in beside) / len(beside))
                if module.bias is not None:
                    module.bias.copy_(sum(each[name].bias for each in beside) / len(beside))
    found = dict(ablations(session, all_parts, index))["neighbours"]
    assert found.mean == pytest.approx(cost(model, changed), abs=1e-5)


def test_bending_is_what_it_says(opened):
    model, session, all_parts = opened
    parts = all_parts[1]
    for kind in BENDS:
        strength = STRENGTHS[kind][-1]
        changes = changer(kind, parts, seed=3)(strength)
        assert set(changes) == set(parts.linears.values())
        for layer, change in changes.items():
            W = layer.weight()
            new = W + change[:, : W.shape[1]]
            if kind.startswith("scale"):
                assert torch.allclose(new, strength * W, atol=1e-6)
            elif kind == "noise":
                assert float((new - W).std() / W.std()) == pytest.approx(strength, rel=0.15)
                assert not torch.equal(changer(kind, parts, seed=4)(strength)[layer], change)
            elif kind == "low-rank":
                kept = torch.linalg.svdvals(W)[: -(-len(torch.linalg.svdvals(W)) // 4)]
                values = torch.linalg.svdvals(new)
                assert torch.allclose(values[: len(kept)], kept, rtol=1e-3)
                assert float(values[len(kept) :].sum()) < 1e-3 * float(kept.sum())
            elif kind == "rounding":
                assert max(len(row.unique()) for row in new) <= 2**strength
            else:
                assert torch.allclose(new.abs(), W.abs())
                assert float((new.sign() != W.sign()).float().mean()) == pytest.approx(strength, abs=0.05)
            if layer.has_bias and not kind.startswith("scale"):
                assert not change[:, -1].any()
        found = session.gain(session.losses(session.report, changes, 1), session.report.losses)
        weights = {
            layer.name: layer.weight() + change[:, : layer.weight().shape[1]] for layer, change in changes.items()
        }
        if not kind.startswith("scale"):  # which scales biases too
            changed = with_matrices(model, 1, lambda name, W, w=weights: w[f"{parts.block.name}.{name}"])
            assert found.mean == pytest.approx(cost(model, changed), abs=1e-5), kind


def test_bending_ends_behind_the_margin_and_tolerates_what_is_within(opened):
    _, session, all_parts = opened
    found = {each.kind: each for each in bent(session, all_parts[1], 0.01, 0, lambda: True)}
    assert list(found) == list(BENDS)
    for each in found.values():
        means = [cost.mean for cost in each.costs]
        assert all(mean <= 0.01 for mean in means[:-1])
        assert len(means) == len(each.strengths) or means[-1] > 0.01
        within = 0
        while within < len(means) and each.costs[within].high <= 0.01:
            within += 1
        assert each.tolerated == (each.strengths[within - 1] if within else None)
    assert list(bent(session, all_parts[1], 0.01, 0, lambda: False)) == []


def test_the_best_scale_is_found_on_select_and_its_gain_is_that_on_report():
    model = model_of("llama")  # without biases, which would be scaled too
    spoilt = with_matrices(model, 1, lambda name, W: 2.0 * W)
    with untouched(spoilt), torch.no_grad():
        session = open_session(spoilt, checked_blocks(spoilt, PROBE), PROBE, name="m", budget_seconds=1e9,
                               micro_batch_tokens=64, watcher=None)  # fmt: skip
        found = best_scale(session, parts_of(session.runner.blocks[1]))
    by_factor = {f: with_matrices(spoilt, 1, lambda name, W, f=f: f * W) for f in (0.5, 0.8, 1.0, 1.2, 1.5)}
    scaled = with_matrices(spoilt, 1, lambda name, W: found.factor * W)
    assert loss(scaled, PROBE.select) <= min(loss(each, PROBE.select) for each in by_factor.values()) + 1e-6
    assert found.gain.mean == pytest.approx(loss(spoilt, PROBE.report) - loss(scaled, PROBE.report), abs=1e-5)


def test_recovery_takes_back_a_part_of_the_damage(opened):
    model, session, all_parts = opened
    found = recovery(session, all_parts[1], 1e-9, 5)
    noise = changer("noise", all_parts[1], 5)(0.5)
    weights = {layer.name: layer.weight() + change[:, : layer.weight().shape[1]] for layer, change in noise.items()}
    name = all_parts[1].block.name
    spoilt = with_matrices(model, 1, lambda each, W: weights[f"{name}.{each}"])
    assert found.damage.mean == pytest.approx(cost(model, spoilt), abs=1e-5)
    if found.share is not None:
        assert found.share == pytest.approx(1 - found.left.mean / found.damage.mean)
    assert found.left.mean != found.damage.mean
    assert recovery(session, all_parts[1], 1e9, 5).share is None  # a damage within the margin


def test_training_a_damaged_block_alone_is_the_training_of_a_copy(monkeypatch):
    model = model_of("llama")
    monkeypatch.setattr(recover, "MOST_STEPS", 30)
    with untouched(model), torch.no_grad():
        session = open_session(model, checked_blocks(model, PROBE), PROBE, name="m", budget_seconds=1e9,
                               micro_batch_tokens=64, watcher=None)  # fmt: skip
        parts = parts_of(session.runner.blocks[1])
        damage = changer("noise", parts, 5)(0.5)
        found = recover.trained_alone(session, parts, damage, -9.0, lambda: True)  # a margin that is never reached
        healed = recover.trained_alone(session, parts, damage, 9.0, lambda: True)
        stopped = recover.trained_alone(session, parts, damage, -9.0, lambda: False)
    assert (healed.steps, healed.best_step, stopped) == (recover.LOOK_EVERY, recover.LOOK_EVERY, None)
    noise = {m.name.removeprefix(f"{parts.block.name}."): d for m, d in damage.items()}
    copied = with_matrices(model, 1, lambda name, W: W + noise[name])
    before = cost(model, copied)
    linears = [m for m in copied.model.layers[1].modules() if isinstance(m, torch.nn.Linear)]
    stds = [float(m.weight.detach().std()) for m in model.model.layers[1].modules() if isinstance(m, torch.nn.Linear)]
    groups = [{"params": [m.weight], "lr": 0.01 * std} for m, std in zip(linears, stds, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    batches = session.fit.batches
    select, report = [], []
    for step in range(30):
        batch = batches[step % len(batches)]
        copied.zero_grad()
        cross_entropy(copied(batch.inputs).logits.flatten(0, 1), batch.targets.flatten()).backward()
        optimizer.step()
        if (step + 1) % recover.LOOK_EVERY == 0:
            select.append(loss(copied, PROBE.select))
            report.append(cost(model, copied))
    looks = min(len(select), found.best_step // recover.LOOK_EVERY + recover.PATIENCE)  # then it ended
    best = min(range(looks), key=select.__getitem__)
    assert found.steps is None
    assert found.best_step == (best + 1) * recover.LOOK_EVERY
    assert found.left.mean == pytest.approx(report[best], abs=1e-4)
    assert found.share == pytest.approx(1 - report[best] / before, abs=1e-3)
    assert found.tokens == sum(batches[step % len(batches)].targets.numel() for step in range(found.best_step))
    assert abs(found.left.mean - before) > 1e-3  # it did something


# -- weights over depth --------------------------------------------------------------------------------


def stack(blocks=6, shape=(40, 30), seed=0):
    return torch.randn(blocks, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grams(W):
    rows = W.shape[1] // 2
    halves = [W[:, :rows].flatten(1), W[:, rows:].flatten(1)]
    return Grams(*(half @ half.T for half in halves))


def share(W, P):
    return float(1 - (W - P).square().sum() / W.square().sum())


def test_shares_and_deltas_are_those_of_the_matrices_themselves():
    W = stack()
    W[3] = 0.6 * W[0] + 0.4 * W[5] + 0.1 * W[3]
    found, g = explained(grams(W)), grams(W)
    others = torch.stack([W[[k for k in range(6) if k != i]].mean(dim=0) for i in range(6)])
    beside = torch.stack([W[[k for k in (i - 1, i + 1) if 0 <= k < 6]].mean(dim=0) for i in range(6)])
    assert found.mean == pytest.approx(share(W, others))
    assert found.neighbours == pytest.approx(share(W, beside))
    fit, held_out = W[:, :20].flatten(1), W[:, 20:].flatten(1)
    P = torch.zeros_like(held_out)
    for i in range(6):
        X = fit[[k for k in range(6) if k != i]]
        damping = 1e-2 * fit.square().sum(dim=1).mean()
        solved = torch.linalg.solve(X @ X.T + damping * torch.eye(5, dtype=W.dtype), X @ fit[i])
        P[i] = (solved[:, None] * held_out[[k for k in range(6) if k != i]]).sum(dim=0)
    assert found.ridge == pytest.approx(share(held_out, P))
    D = W[1:] - W[:-1]
    cosines = [float((a * b).sum() / a.norm() / b.norm()) for a, b in itertools.pairwise(D)]
    assert deltas(g.both) == pytest.approx(sum(cosines) / len(cosines))
    assert coefficients(g.both, 3)[[0, 5]].tolist() == pytest.approx([0.6, 0.4], abs=0.05)


def test_planted_relations_are_found_and_independent_matrices_tell_nothing():
    independent = stack(12)
    common = independent + 3 * stack(1, seed=1)
    smooth = stack(12, seed=2).cumsum(dim=0)  # neighbours alike, and differences that are independent
    none, mean, walk = (explained(grams(W)) for W in (independent, common, smooth))
    assert abs(none.ridge) < 0.02
    assert none.mean < 0
    assert mean.mean > 0.8  # a mean matrix alone
    assert walk.neighbours > mean.neighbours > none.neighbours
    assert deltas(grams(independent).both) == pytest.approx(-0.5, abs=0.05)
    assert deltas(grams(common).both) == pytest.approx(-0.5, abs=0.05)  # which says nothing of depth
    assert abs(deltas(grams(smooth).both)) < 0.05


def test_the_controls_stand_beside_the_numbers():
    model = PlainGPT(blocks=8)
    with torch.no_grad():
        walk = stack(8, model.blocks[0].feed_forward[0].weight.shape, seed=3).cumsum(dim=0)  # over depth
        for block, weight in zip(model.blocks, walk, strict=True):
            block.feed_forward[0].weight.copy_(weight)
    all_parts = [parts_of(block) for block in checked_blocks(model, PROBE)]
    same = kinds(all_parts)
    assert "feed_forward.0" in same
    walk = predictability("feed_forward.0", same["feed_forward.0"], 0)
    assert walk.explained.neighbours > walk.neighbours_shuffled[2]  # the order matters
    assert walk.deltas > walk.deltas_shuffled[2]
    assert walk.deltas_independent == pytest.approx(-0.5, abs=0.05)
    plain = predictability("attention.out", same["attention.out"], 0)
    assert plain.neighbours_shuffled[1] <= plain.explained.neighbours <= plain.neighbours_shuffled[2]
    assert abs(plain.explained.ridge - plain.independent.ridge) < 0.05


def test_halves_of_rows_add_up_and_the_control_has_the_norms(opened):
    _, _, all_parts = opened
    for layers in kinds(all_parts).values():
        W = torch.stack([layer.weight().double().flatten() for layer in layers])
        assert torch.allclose(grams_of(layers, 0).both, W @ W.T, rtol=1e-4, atol=1e-3)
        control = grams_of(layers, 0, independent=True).both
        assert torch.allclose(control.diagonal(), (W * W).sum(dim=1), rtol=1e-3)
        size = control.diagonal().sqrt()
        off = (control / size / size[:, None]).fill_diagonal_(0)
        assert float(off.abs().max()) < 6 / W.shape[1] ** 0.5


def test_predicted_weights_are_put_in_place(opened):
    model, session, all_parts = opened
    same = kinds(all_parts)
    weights = {part: torch.linspace(0.1, 0.3, len(all_parts), dtype=torch.float64) for part in same}
    for each in weights.values():
        each[1] = 0
    changes = predictions(all_parts, 1, weights)

    def guess(name, W):
        layers = [dict(block.named_modules())[name].weight for block in layers_of(model)]
        return sum(float(c) * w for c, w in zip(weights[name], layers, strict=True))

    changed = with_matrices(model, 1, guess)
    found = session.gain(session.losses(session.report, changes, 1), session.report.losses)
    assert found.mean == pytest.approx(cost(model, changed), abs=1e-4)
