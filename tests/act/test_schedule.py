"""Schedules of blocks against trainings in which gradients are thrown away by hand."""

import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy

from peelwise.act import BlockSchedule, all_blocks, by_importance, growth, random_blocks
from peelwise.act.schedule import NeverUpdatedWarning
from peelwise.errors import OptionError
from plain_gpt import PlainGPT
from tiny_llama import tiny_llama


def made(blocks=4, kind=torch.optim.AdamW):
    torch.manual_seed(0)
    model = PlainGPT(blocks=blocks)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    return model, kind(model.parameters(), lr=0.01, weight_decay=0.1, **options)


def loss_of(model, step):
    ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(step))
    out = model(ids[:, :-1])
    return cross_entropy(getattr(out, "logits", out).flatten(0, 1), ids[:, 1:].flatten())


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train(model, optimizer, schedule, steps):
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def alternating(step, blocks, generator):
    return [step % blocks, (step + 2) % blocks]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_training_is_the_one_whose_other_gradients_are_thrown_away(kind):
    model, optimizer = made(kind=kind)
    schedule = BlockSchedule(model, optimizer, alternating)
    train(model, optimizer, schedule, range(6))
    plain, by_hand = made(kind=kind)
    for step in range(6):
        loss_of(plain, step).backward()
        for index, block in enumerate(plain.blocks):
            if index not in alternating(step, 4, None):
                block.zero_grad(set_to_none=True)
        by_hand.step()
        by_hand.zero_grad(set_to_none=True)
    assert same(weights(model), weights(plain))
    whole, everything = made(kind=kind)
    train(whole, everything, None, range(6))
    assert not same(weights(model), weights(whole))  # the control: it is not the training of all blocks
    assert schedule.block_steps == [3, 3, 3, 3]
    assert schedule.record()["block_steps_in_all"] == 12
    assert schedule.seconds > 0


def test_frozen_blocks_keep_every_bit_though_weights_decay():
    model, optimizer = made()
    train(model, optimizer, None, range(2))  # moments that would move it
    with pytest.warns(NeverUpdatedWarning, match=r"Blocks \[0, 2, 3\] are never updated"):
        schedule = BlockSchedule(model, optimizer, lambda *_: [1], never=True)
    before = weights(model)
    train(model, optimizer, schedule, range(2, 5))
    after = weights(model)
    unmoved = {name for name in before if torch.equal(before[name], after[name])}
    assert unmoved == {name for name in before if name.startswith(("blocks.0.", "blocks.2.", "blocks.3."))}
    schedule.close()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("outer", ["cut", "always"])
def test_nothing_below_the_lowest_active_block_is_differentiated(outer):
    model, optimizer = made()
    with pytest.warns(NeverUpdatedWarning):
        schedule = BlockSchedule(model, optimizer, lambda *_: [2], outer=outer, never=True)
    stations = []
    handles = [b.register_forward_hook(lambda m, a, out: stations.append(out)) for b in model.blocks]
    loss = loss_of(model, 0)
    assert [s.requires_grad for s in stations] == [outer == "always"] * 2 + [True, True]
    loss.backward()
    assert (model.tokens.weight.grad is None) == (outer == "cut")
    assert {i for i, b in enumerate(model.blocks) if any(p.grad is not None for p in b.parameters())} == {2}
    for handle in handles:
        handle.remove()
    schedule.close()


def test_a_tied_embedding_gets_the_head_s_part_of_its_gradient():
    model = tiny_llama(tied=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(NeverUpdatedWarning):
        schedule = BlockSchedule(model, optimizer, lambda *_: [1], outer="cut", never=True)
    loss_of(model, 0).backward()
    found = model.lm_head.weight.grad.clone()
    schedule.close()
    model.zero_grad()
    ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    hidden = model.model(ids[:, :-1]).last_hidden_state.detach()
    cross_entropy(model.lm_head(hidden).flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert torch.allclose(found, model.lm_head.weight.grad, atol=1e-7)
    model.zero_grad()
    loss_of(model, 0).backward()
    assert not torch.allclose(found, model.lm_head.weight.grad, atol=1e-4)  # the whole one is another


@pytest.mark.parametrize("forget", [False, True])
def test_moments_are_kept_or_dropped(forget):
    model, optimizer = made()
    train(model, optimizer, None, range(1))
    with pytest.warns(NeverUpdatedWarning):
        schedule = BlockSchedule(model, optimizer, lambda *_: [0], forget=forget, never=True)
    held = [i for i, b in enumerate(model.blocks) if any(p in optimizer.state for p in b.parameters())]
    assert held == ([0] if forget else [0, 1, 2, 3])
    schedule.close()


def test_a_resumed_training_is_the_uninterrupted_one():
    model, optimizer = made()
    schedule = BlockSchedule(model, optimizer, random_blocks(2), outer="cut", every=2, seed=5)
    train(model, optimizer, schedule, range(3))
    saved = (weights(model), optimizer.state_dict(), schedule.state_dict())
    copies = torch.load(_through_a_file(saved), weights_only=True)
    train(model, optimizer, schedule, range(3, 9))
    again, its_optimizer = made()
    later = BlockSchedule(again, its_optimizer, random_blocks(2), outer="cut", every=2, seed=5)
    again.load_state_dict(copies[0])
    its_optimizer.load_state_dict(copies[1])
    later.load_state_dict(copies[2])
    train(again, its_optimizer, later, range(3, 9))
    assert same(weights(model), weights(again))
    assert later.block_steps == schedule.block_steps
    assert later.steps == 9


def _through_a_file(value):
    import io

    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_a_state_of_another_schedule_is_refused():
    schedules = [BlockSchedule(*made(blocks), random_blocks(2), seed=s) for blocks, s in ((4, 0), (4, 1), (3, 0))]
    with pytest.raises(OptionError, match="has seed 1, this one 0"):
        schedules[0].load_state_dict(schedules[1].state_dict())
    with pytest.raises(OptionError, match="is of 3 blocks, the model has 4"):
        schedules[0].load_state_dict(schedules[2].state_dict())
    for other, name in (({"distinct": 30}, "distinct"), ({"outer": "cut"}, "outer"), ({"every": 2}, "every")):
        later = BlockSchedule(*made(), random_blocks(2), **other)
        with pytest.raises(OptionError, match=f"saved schedule has {name}"):
            schedules[0].load_state_dict(later.state_dict())
    for state in ({}, {"steps": 1.5}, torch.optim.SGD(made()[0].parameters(), lr=0.1).state_dict()):
        with pytest.raises(OptionError, match="no saved state of a schedule of blocks"):
            schedules[0].load_state_dict(state)


def drawn(rule, blocks=5, draws=4_000):
    found = torch.zeros(blocks)
    for seed in range(draws):
        chosen = list(rule(0, blocks, torch.Generator().manual_seed(seed)))
        assert len(set(chosen)) == len(chosen)
        found[chosen] += 1 / draws
    return found


def test_random_subsets_are_uniform():
    assert torch.allclose(drawn(random_blocks(2)), torch.full((5,), 0.4), atol=0.03)  # 4 standard errors


def test_draws_by_importance_have_the_chances_of_drawing_without_replacement():
    w = [1.0, 2.0, 3.0, 4.0, 10.0]
    expected = torch.zeros(5)
    for i, j in itertools.permutations(range(5), 2):
        chance = w[i] / 20 * w[j] / (20 - w[i])
        expected[[i, j]] += chance
    found = drawn(by_importance(2, w))
    assert torch.allclose(found, expected, atol=0.03)
    assert not torch.allclose(found, torch.full((5,), 0.4), atol=0.1)


def test_growth_trains_the_most_important_first_and_longest():
    rule = growth([0.3, 2.0, 0.1, 1.0], [1, 2, 4], steps=9)
    sets = [sorted(rule(step, 4, None)) for step in range(11)]
    assert sets == [[1]] * 3 + [[1, 3]] * 3 + [[0, 1, 2, 3]] * 5


def test_sets_can_be_few():
    schedule = BlockSchedule(*made(), random_blocks(2), distinct=3, seed=2)
    assert len({schedule.drawn(step) for step in range(60)}) <= 3
    assert len({BlockSchedule(*made(), random_blocks(2), seed=2).drawn(step) for step in range(60)}) == 6


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (lambda *_: [0, 1], {}, r"never updates blocks \[2, 3\]"),
        (growth([1.0, 2.0, 3.0, 4.0], [1, 2], steps=10), {}, r"never updates blocks \[0, 1\] in 10 steps"),
        (lambda *_: [], {}, "no block is updated at step 0"),
        (lambda *_: [4], {}, "there is no block 4; expected 0 to 3"),
        (random_blocks(5), {}, "5 blocks were asked for, the model has 4"),
        (by_importance(1, [1.0]), {}, "one number for each of 4 blocks, got 1"),
        (all_blocks, {"outer": "some"}, 'expected "always" or "cut"'),
        (all_blocks, {"every": 0}, "expected at least 1, got 0"),
    ],
)
def test_what_is_refused(rule, options, message):
    with pytest.raises(OptionError, match=message):
        BlockSchedule(*made(), rule, **options)


def test_rules_that_cannot_be_and_optimisers_that_lack_a_parameter_are_refused():
    with pytest.raises(OptionError, match=r"expected positive numbers, got 0.0 for block 1"):
        by_importance(1, [1.0, 0.0])
    with pytest.raises(OptionError, match="at least one block, got 0"):
        random_blocks(0)
    with pytest.raises(OptionError, match="one to 2 phases, got 3"):
        growth([1.0], [1, 1, 1], steps=2)
    model, _ = made()
    with pytest.raises(OptionError, match="leave out"):
        BlockSchedule(model, torch.optim.SGD(model.blocks.parameters(), lr=0.1))


def graphs_compiled(compile_blocks):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made_graphs = []

    def backend(graph, inputs):
        made_graphs.append(graph)
        return graph.forward

    model, optimizer = made(blocks=6)
    running = model
    if compile_blocks:
        for block in model.blocks:
            block.compile(backend=backend)
    else:
        running = torch.compile(model, backend=backend)
    schedule = BlockSchedule(running, optimizer, random_blocks(3), outer="cut", seed=1)
    counts, sets = [], set()
    for step in range(24):
        sets.add(schedule.active)
        train(running, optimizer, schedule, [step])
        counts.append(len(made_graphs))
    torch._dynamo.reset()
    return counts, len(sets), weights(model)


def test_compiled_blocks_are_compiled_a_few_times_however_many_sets_are_drawn():
    counts, sets, found = graphs_compiled(compile_blocks=True)
    assert sets > 8
    assert counts[-1] <= 8  # flags of input and parameters, for the first block with the cut and for the others
    assert counts[-1] == counts[11]
    model, optimizer = made(blocks=6)
    train(model, optimizer, BlockSchedule(model, optimizer, random_blocks(3), outer="cut", seed=1), range(24))
    assert all(torch.allclose(found[name], w, atol=1e-5) for name, w in weights(model).items())
