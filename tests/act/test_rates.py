"""Layer-wise rates: every factor, group and step against the plain computation."""

import pytest
import torch

from peelwise.act import RateMap, check_groups, factors_of, param_groups
from peelwise.errors import OptionError
from plain_gpt import PlainGPT
from tiny_llama import tiny_llama


def moved(model, optimizer, gradient=1.0):
    """Take a step with the same gradient everywhere; return by how much each parameter fell."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    optimizer.step()
    return {name: float((before[name] - p).detach().mean()) for name, p in model.named_parameters()}


def rates_of(factors, base, names):
    return {name: base * (factors[int(name.split(".")[1])] if name.startswith("blocks.") else 1.0) for name in names}


def test_the_map_is_the_straight_line_from_the_smallest_weight_to_the_largest():
    assert factors_of([2.0, 3.0, 6.0]) == pytest.approx([1.0, 2.0, 5.0])
    assert factors_of([2.0, 3.0, 6.0], span=(0.5, 2.5)) == pytest.approx([0.5, 1.0, 2.5])
    assert factors_of([2.0, 3.0, 6.0], span=(5, 1)) == pytest.approx([5.0, 4.0, 1.0])
    assert factors_of([1.0, 10.0, 100.0], scale="log") == pytest.approx([1.0, 3.0, 5.0])
    assert factors_of([1.0, 10.0, 1e9], scale="rank") == pytest.approx([1.0, 3.0, 5.0])
    assert factors_of([7.0, 7.0, 1.0], scale="rank") == pytest.approx([5.0, 5.0, 1.0])
    assert factors_of([4.0, 4.0]) == [3.0, 3.0]


@pytest.mark.parametrize("scale", ["linear", "log", "rank"])
def test_the_map_keeps_the_order_of_any_weights(scale):
    weights = torch.rand(40, generator=torch.Generator().manual_seed(1)).add(0.01).tolist()
    factors = factors_of(weights, scale=scale)
    order = sorted(range(40), key=weights.__getitem__)
    assert [factors[i] for i in order] == sorted(factors)
    assert (min(factors), max(factors)) == (1.0, 5.0)


@pytest.mark.parametrize("decay", [None, 0.1])
def test_every_parameter_is_in_one_group_and_moves_at_its_own_rate(decay):
    model = PlainGPT()
    groups = param_groups(model, {2: 1.0, 0: 2.0, 1: 5.0}, base_lr=0.01, weight_decay=decay)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    expected = rates_of([2.0, 5.0, 1.0], 0.01, dict(model.named_parameters()))
    optimizer = torch.optim.SGD([{**group, "weight_decay": 0.0} for group in groups])
    assert moved(model, optimizer) == pytest.approx(expected, rel=1e-3)
    if decay is not None:
        assert all((group["weight_decay"] == decay) == (p.dim() > 1) for group in groups for p in group["params"])


def test_what_lies_outside_of_the_blocks_has_its_own_factor():
    model = PlainGPT()
    optimizer = torch.optim.SGD(param_groups(model, [1.0, 2.0, 5.0], base_lr=0.01, outside=3.0))
    expected = rates_of([1.0, 2.0, 5.0], 0.01, dict(model.named_parameters()))
    expected |= {name: 0.03 for name in expected if not name.startswith("blocks.")}
    assert moved(model, optimizer) == pytest.approx(expected, rel=1e-3)


def test_a_tied_head_and_frozen_parameters():
    model = tiny_llama(tied=True)
    model.model.layers[0].requires_grad_(False)
    groups = param_groups(model, [1.0, 2.0], base_lr=1e-3)
    assert {group["block"] for group in groups} == {None, 1}
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ([1.0, 2.0], {}, r"3 blocks need one number each; there is none for \[2\]"),
        ([1.0, 2.0, 3.0, 4.0], {}, "there is no block 3; expected 0 to 2"),
        ({0: 1.0, 1: 1.0, "2": 1.0}, {}, "there is no block '2'"),
        ([1.0, 0.0, 2.0], {}, "expected positive numbers, got 0.0 for block 1"),
        ([1.0, float("nan"), 2.0], {}, "expected positive numbers, got nan for block 1"),
        ([1.0, 2.0, 3.0], {"base_lr": -1.0}, "base_lr: expected a positive number"),
        ([1.0, 2.0, 3.0], {"span": (0.0, 5.0)}, "span: expected two positive factors"),
        ([1.0, 2.0, 3.0], {"outside": 0.0}, "outside: expected a positive factor"),
        ([1.0, 2.0, 3.0], {"scale": "cubic"}, 'expected "linear", "log" or "rank"'),
    ],
)
def test_what_is_refused(weights, options, message):
    with pytest.raises(OptionError, match=message):
        param_groups(PlainGPT(), weights, **{"base_lr": 0.1} | options)


def test_blocks_that_share_a_parameter_are_refused():
    model = PlainGPT()
    model.blocks[2].norm_1 = model.blocks[0].norm_1
    with pytest.raises(OptionError, match="Blocks 0 and 2 share a parameter"):
        param_groups(model, [1.0, 2.0, 3.0], base_lr=0.1)


def test_groups_that_leave_one_out_or_hold_one_twice_are_refused():
    model = PlainGPT()
    own = list(model.parameters())
    check_groups(model, [{"params": own}])
    with pytest.raises(OptionError, match=r"leave out 1 trainable parameters, the first is tokens\.weight"):
        check_groups(model, [{"params": own[1:]}])
    with pytest.raises(OptionError, match=r"hold tokens\.weight twice"):
        check_groups(model, [{"params": own}, {"params": own[:1]}])


def mapped(weights, every=2):
    torch.manual_seed(0)
    model = PlainGPT()
    optimizer = torch.optim.SGD(param_groups(model, [1.0, 2.0, 5.0], base_lr=0.01))
    given = iter(weights)
    return model, optimizer, RateMap(optimizer, lambda: next(given), every=every)


def test_rates_are_mapped_again_every_so_many_steps_under_a_schedule():
    model, optimizer, rates = mapped([[5.0, 2.0, 1.0], None])
    halving = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    names = dict(model.named_parameters())
    for step, factors in enumerate([[1, 2, 5], [1, 2, 5], [5, 2, 1], [5, 2, 1], [5, 2, 1]]):
        plain = [group["lr"] for group in optimizer.param_groups]
        assert moved(model, optimizer) == pytest.approx(rates_of(factors, 0.01 * 0.5**step, names), rel=1e-3)
        assert [group["lr"] for group in optimizer.param_groups] == plain  # the schedule's own
        halving.step()
        assert rates.step() == (step == 1)
    assert rates.factors == pytest.approx([5.0, 2.0, 1.0])


def test_a_map_goes_on_after_a_checkpoint():
    _, optimizer, rates = mapped([[5.0, 2.0, 1.0]])
    rates.step(), rates.step()
    other, again, later = mapped([[1.0, 2.0, 5.0]], every=4)
    again.load_state_dict(optimizer.state_dict())
    later.load_state_dict(rates.state_dict())
    assert later.factors == pytest.approx([5.0, 2.0, 1.0])
    expected = rates_of([5, 2, 1], 0.01, dict(other.named_parameters()))
    assert moved(other, again) == pytest.approx(expected, rel=1e-3)
    assert not later.step()
    assert later.step()  # the fourth of all
    later.close()
    expected = rates_of([1, 2, 5], 0.01, dict(other.named_parameters()))  # those of the groups
    assert moved(other, again) == pytest.approx(expected, rel=1e-3)


def test_a_map_that_cannot_be_is_refused_and_changes_nothing():
    _, optimizer, rates = mapped([[1.0, -2.0, 5.0]], every=1)
    with pytest.raises(OptionError, match=r"got -2\.0 for block 1"):
        rates.step()
    assert rates.factors == pytest.approx([1.0, 2.0, 5.0])
    with pytest.raises(OptionError, match=r"made from peelwise\.act\.param_groups"):
        RateMap(torch.optim.SGD(PlainGPT().parameters(), lr=0.1), lambda: [1.0])
    with pytest.raises(OptionError, match="every: expected at least 1"):
        RateMap(optimizer, lambda: [1.0], every=0)


@pytest.mark.parametrize("state", [{}, {"steps": "3"}, {"steps": -1}, {"steps": True}])
def test_a_state_of_something_else_is_refused(state):
    _, _, rates = mapped([])
    with pytest.raises(OptionError, match="no saved state of a map of rates"):
        rates.load_state_dict(state)


@pytest.mark.parametrize("tensors", [True, False])
def test_a_compiled_step_is_not_compiled_anew_at_every_map(tensors):
    steps, maps = 24, 12
    models, graphs = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for compiled in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = PlainGPT()
        groups = param_groups(model, [1.0, 2.0, 3.0], base_lr=1e-3)
        if tensors:
            groups = [{**group, "lr": torch.tensor(group["lr"])} for group in groups]
        optimizer = torch.optim.SGD(groups)
        rates = RateMap(optimizer, lambda: None, every=2)
        step = torch.compile(optimizer.step, backend=backend) if compiled else optimizer.step
        for number in range(steps):
            for p in model.parameters():
                p.grad = torch.full_like(p, 1.0)
            step()
            if number % 2:
                rates.remap([1.0 + (number * k) % 7 for k in (1, 2, 3)])
        models.append(model)
    torch._dynamo.reset()
    assert len(graphs) <= (2 if tensors else 5) < maps
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*(m.parameters() for m in models), strict=True))
