"""Loads of experts against counts of the router's own choices; faults of mixtures, told by a check and by a monitor."""

import math

import pytest
import torch

import peelwise
from audits import tiny_probe
from peelwise.engine.experts import copies, loads_of, mixtures_of
from peelwise.evidence.mixtures import MixtureWatch, dead, has_collapsed, spread
from peelwise.model.architectures import find_blocks
from peelwise.model.guard import untouched
from peelwise.model.runner import Runner
from peelwise.show.check.words import conclusion
from zoo import ZOO


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
@torch.no_grad()
def test_loads_are_counts_of_what_the_router_chose(name):
    model, probe = ZOO[name](), tiny_probe()
    chosen = []
    module = next(m for n, m in model.named_modules() if n.endswith("experts"))
    handle = module.register_forward_pre_hook(lambda _m, args: chosen.append(args[1].flatten()))
    model(probe.fit.inputs)
    handle.remove()
    with untouched(model):
        runner = Runner(model, find_blocks(model))
        trace = runner.trace(probe.fit)
        (found,) = loads_of(runner, runner.blocks[0], trace)
    assert probe.fit.mask.all()
    assert list(found.tokens) == torch.bincount(torch.cat(chosen), minlength=4).tolist()
    assert found.per_token == pytest.approx(2)
    assert found.copies == ()


def broken(model, block, how):
    """Break the mixture of one block of a tiny gpt-oss; its router has a bias."""
    mlp = model.model.layers[block].mlp
    with torch.no_grad():
        if how == "collapsed":
            mlp.router.bias[:2] += 1e3
        elif how == "dead":
            mlp.router.bias[3] -= 1e3
        else:
            mlp.experts.gate_up_proj[2] = 2.0 * mlp.experts.gate_up_proj[1]


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        (
            "collapsed",
            "router-collapsed",
            "Block 1: its router has collapsed: 100% of all tokens go to experts 0, 1 of 4.",
        ),
        ("dead", "dead-experts", "Block 1: 1 of 4 experts were given no token of this text"),
        ("copied", "copied-experts", "Block 1: experts 1 and 2 have the same weights."),
    ],
)
def test_a_check_names_the_mixture_at_fault_and_says_so_first(how, code, said):
    model, probe = ZOO["gpt-oss"](), tiny_probe()
    before = {note.code for note in peelwise.check(model, probe).record.notes}
    assert not before & {"router-collapsed", "dead-experts", "copied-experts"}
    broken(model, 1, how)
    record = peelwise.check(model, probe).record
    found = [note for note in record.notes if note.code == code]
    assert [note.values["block"] for note in found] == [1]
    assert conclusion(record).startswith(said)


def test_a_monitor_tells_a_collapsed_router_and_dead_experts_once():
    for how, kind in (("collapsed", "router-collapsed"), ("dead", "dead-experts")):
        model, probe = ZOO["gpt-oss"](), tiny_probe()
        broken(model, 1, how)
        with peelwise.Monitor(model, probe, budget=None, schedule=peelwise.every(1), store=None) as monitor:
            rows = [monitor.step(step, loss=1.0) for step in range(5)]
            told = [(e.kind, e.block, e.step) for e in monitor.events if e.kind in ("router-collapsed", "dead-experts")]
        assert told == [(kind, 1, 2)]
        values = {s.block: s.value for s in rows[-1].statistics if s.name == "expert_spread"}
        with untouched(model):
            runner = Runner(model, find_blocks(model))
            (loads,) = loads_of(runner, runner.blocks[0], runner.trace(probe.fit))
        assert values[0] == pytest.approx(spread(loads.tokens, loads.per_token), rel=1e-6)  # as a check counts it
        assert values[1] == pytest.approx(0.0 if how == "collapsed" else values[1], abs=1e-6)
        assert values[0] > 0.3


def test_the_spread_is_one_where_even_and_zero_where_the_same_experts_take_all():
    assert spread([10] * 8, 2) == pytest.approx(1.0)
    assert spread([40, 40, 0, 0, 0, 0, 0, 0], 2) == pytest.approx(0.0, abs=1e-12)
    assert spread([20, 20, 20, 0, 0, 0, 0, 0], 2) == pytest.approx(math.log(3 / 2) / math.log(4))
    assert spread([5, 5], 2) is None  # all experts see all tokens
    assert spread([0, 0, 0], 1) is None
    assert has_collapsed(0.1)
    assert not has_collapsed(None)


def test_an_expert_without_a_token_says_nothing_where_few_were_to_be_had():
    assert dead([100, 0, 100, 100]) == [1]
    assert dead([40, 0, 40, 39]) == []


def test_a_fault_is_told_at_the_third_measurement_and_again_when_it_comes_back():
    watch = MixtureWatch()
    bad, good = (
        {"expert_spread": [None, v], "experts_used": [None, 1.0], "expert_tokens": [None, 64.0]} for v in (0.1, 0.9)
    )
    told = [[e.kind for e in watch.add(step, bad)] for step in range(5)]
    assert told == [[], [], ["router-collapsed"], [], []]
    assert watch.add(5, good) == []
    assert [[e.block for e in watch.add(step, bad)] for step in (6, 7, 8)] == [[], [], [1]]


def test_copies_are_found_up_to_a_factor():
    model = ZOO["mixtral"]()
    (experts,) = mixtures_of(find_blocks(model)[0])
    assert copies(experts) == []
    with torch.no_grad():
        experts[0].parameter[3] = -2 * experts[0].parameter[1]
    assert copies(experts) == []  # the other sign is another function
    with torch.no_grad():
        experts[0].parameter[3] = 2 * experts[0].parameter[1]
    assert copies(experts) == [(1, 3)]
