"""One reference block: what it stores, which maps it solves, and that it hits a station it can hit."""

from __future__ import annotations

import copy

import pytest
import torch

from audits import Snapshot, runner_of, session_of, split_of, tiny_probe
from peelwise.tasks.peel.climber import Climber
from peelwise.tasks.peel.fit import FitOptions, _solve, coordinate_weights, find_writers, fit_block
from peelwise.tasks.peel.reference_block import ReferenceBlock, State
from peelwise.tasks.peel.station_error import StationError, Target
from zoo import ZOO, sample_ids

WRITERS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "neox-parallel": ("attention.dense", "mlp.dense_4h_to_h"),
    "gemma2": ("self_attn.o_proj", "mlp.down_proj"),
    "gemma3": ("self_attn.o_proj", "mlp.down_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "plain": ("attention.out", "feed_forward.2"),
}


def traces_of(model, probe=None):
    runner = runner_of(model)
    probe = probe or tiny_probe()
    return runner, {part: runner.trace(getattr(probe, part)) for part in ("fit", "select", "report")}


def target_of(traces, station, *, weighted=True):
    fit, select = ([b.stations[station] for b in traces[part].batches] for part in ("fit", "select"))
    return Target(fit, select, coordinate_weights(traces["fit"], fit, weighted=weighted))


@pytest.mark.parametrize("name", WRITERS)
def test_output_projections_are_found_by_what_they_do(name):
    runner, traces = traces_of(ZOO[name]())
    for block in runner.blocks:
        found = find_writers(runner, block, traces["fit"].batches[0])
        assert {m.name.removeprefix(f"{block.name}.") for m in found} == set(WRITERS[name])
        assert "mlp" in found[-1].name or found[-1].name.endswith(("fc2", "feed_forward.2"))  # in running order


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_reference_is_its_changes_and_the_model_stays(name):
    model = ZOO[name]()
    block = runner_of(model).blocks[1]
    before = Snapshot.of(model)
    reference = ReferenceBlock(block)
    draw = torch.Generator().manual_seed(0)
    shapes = {m: (m.weight().shape[0], m.weight().shape[1] + m.has_bias) for m in reference.block.linears}
    steps = {m: torch.randn(shape, generator=draw) for m, shape in shapes.items()}
    reference.set(State().moved(steps, 0.1))
    for old, new in zip(block.linears, reference.block.linears, strict=True):
        moved = 0.1 * steps[new]
        weight = moved[:, :-1] if old.has_bias else moved
        torch.testing.assert_close(new.weight(), old.weight() + weight.bfloat16().float())
        if old.has_bias:
            torch.testing.assert_close(new.bias(), old.bias() + moved[:, -1].bfloat16().float())
    again = ReferenceBlock(block, reference.state)
    pairs = zip(again.block.module.parameters(), reference.block.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    reference.set(State())
    pairs = zip(reference.block.module.parameters(), block.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    before.assert_unchanged(model)


def test_weights_are_inverse_variances_of_predicted_tokens():
    rows = [r[:n] for r, n in zip(sample_ids(3, 9).tolist(), (9, 4, 6), strict=True)]
    runner = runner_of(ZOO["llama"]())
    trace = runner.trace(split_of(rows))
    stations = [b.stations[1] for b in trace.batches]
    rows = torch.cat([s[b.weights] for s, b in zip(stations, trace.batches, strict=True)]).double()
    variance = rows.var(0, correction=0)
    torch.testing.assert_close(coordinate_weights(trace, stations, weighted=True), 1 / variance)
    plain = coordinate_weights(trace, stations, weighted=False)
    torch.testing.assert_close(plain, torch.full_like(plain, 1 / float(variance.mean())))


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox-parallel", "opt", "plain"])
def test_the_last_projection_is_solved_exactly_where_that_is_possible(name):
    """The target is the same block with another MLP output: one closed-form solve must find it."""
    model = ZOO[name]()
    other = copy.deepcopy(model)
    probe = tiny_probe(100)
    runner, traces = traces_of(model, probe)
    last = find_writers(runner, runner.blocks[0], traces["fit"].batches[0])[-1]
    with torch.no_grad():
        for parameter in other.get_submodule(last.name).parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    _, other_traces = traces_of(other, probe)
    reference = ReferenceBlock(runner.blocks[0])
    (linear,) = (m for m in reference.block.linears if m.name == last.name)
    problem = StationError(runner, reference, traces["fit"], traces["select"], target_of(other_traces, 1))
    start = problem.select_error()
    assert start > 0.05
    assert _solve(problem, linear, start) < 1e-4 * start  # what damping and rounding to bfloat16 leave
    assert problem.select_error() < 1e-4 * start


def test_more_rounds_and_steps_only_help_on_select():
    runner, traces = traces_of(ZOO["llama"]())
    errors = []
    for options in (FitOptions(1, steps=False), FitOptions(1), FitOptions(6)):
        reference = ReferenceBlock(runner.blocks[0])
        errors.append(
            fit_block(runner, reference, traces["fit"], traces["select"], target_of(traces, 3), options).select_error
        )
    assert errors[0] >= errors[1] >= errors[2]


def test_shared_prefixes_are_fitted_once_and_give_the_same_stack():
    model = ZOO["llama"]()
    session = session_of(model)
    shared = Climber(session, FitOptions(1))
    maps = [(2, 2, 3), (2, 3, 3), (3, 3, 3), (2, 2, 3)]
    assert shared.to_fit(maps[0]) == 3
    for stations in maps:
        found = shared.climb(stations)
        alone = Climber(session, FitOptions(1))
        expected = alone.climb(stations)
        for a, b in zip(found, expected, strict=True):
            assert a.fitted == b.fitted
            assert a.state.changes.keys() == b.state.changes.keys()
            assert all(torch.equal(a.state.changes[k], b.state.changes[k]) for k in a.state.changes)
        for x, y in zip(shared.stack.traces["report"].batches, alone.stack.traces["report"].batches, strict=True):
            assert torch.equal(x.stations[-1], y.stations[-1])
    assert shared.to_fit((2, 3, 3)) == 0
    assert shared.to_fit((3, 3, 3)) == 0
    assert len(session.fit.batches[0].stations) == 4  # the model's own trace is not grown or cut


def test_a_small_cache_forgets_but_never_the_path():
    climber = Climber(session_of(ZOO["llama"]()), FitOptions(1, steps=False), cache_bytes=1)
    first = climber.climb((2, 2, 3))
    climber.climb((3, 3, 3))
    assert climber.to_fit((2, 2, 3)) == 3
    again = climber.climb((2, 2, 3))
    assert all(
        torch.equal(x.state.changes[k], y.state.changes[k])
        for x, y in zip(first, again, strict=True)
        for k in x.state.changes
    )
