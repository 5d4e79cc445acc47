"""Whole peels: architectures, theorems with controls, ways of stopping, bad input."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import damage
import peelwise
from audits import Snapshot, flat, part_of, tiny_probe
from peelwise.errors import MapError, PeelwiseError, UnsupportedModelError
from peelwise.probe.probe import Probe
from peelwise.records.peel import PeelRecord
from peelwise.tasks.peel import stages as visits
from peelwise.tasks.peel.run import run_peel
from peelwise.tasks.peel.settings import PeelSettings
from zoo import BLOCKS, UNSUPPORTED, VOCABULARY, ZOO, sample_ids

DIRECT, ALL_TO_LAST = (1, 2, 3), (3, 3, 3)
QUICK = PeelSettings(600.0, maps=(DIRECT, ALL_TO_LAST), rounds=1)


def numbers(record):
    """Return what a record says, without when it was made and how long it took."""
    plain = record.model_dump(exclude={"created", "cost", "digest", "witness", "versions"})
    plain["settings"].pop("micro_batch_tokens")
    for one in plain["maps"]:
        one.pop("wall_seconds")
    return plain


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox-parallel", "gemma2", "gemma3", "qwen2-tied", "opt", "plain"])
def test_architectures_are_peeled_and_left_alone(name):
    model = ZOO[name]()
    before = Snapshot.of(model)
    outcome = run_peel(model, tiny_probe(), QUICK, name=name)
    before.assert_unchanged(model)
    record = outcome.record
    assert record.complete
    assert [m.stations for m in record.maps if m.name == "direct"] == [DIRECT]
    assert all(math.isfinite(value) for _, value in flat(record.model_dump()) if isinstance(value, float))
    assert (record.loss.head_control is None) == (name == "gemma2")  # its logits are capped behind the head
    assert None not in (record.loss.bound, record.loss.shuffled, record.loss.untrained, record.informative)
    assert all(tensor.isfinite().all() for tensor in outcome.witness.values())


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_refused(name):
    with pytest.raises(UnsupportedModelError):
        run_peel(UNSUPPORTED[name](), tiny_probe(), QUICK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_direct_map_started_warm_is_the_model(dtype):
    outcome = run_peel(ZOO["llama"]().to(dtype), tiny_probe(), dataclasses.replace(QUICK, maps=(DIRECT,)))
    record = outcome.record
    (direct,) = record.maps
    assert direct.own_head.report == record.loss.current
    assert direct.loss.report == record.loss.head_control
    assert direct.unexplained == (0.0, 0.0, 0.0)
    assert (direct.gain_over_head.low, direct.gain_over_head.high) == (0.0, 0.0)
    assert not any(name.startswith("stack/") for name in outcome.witness)
    assert record.conclusion.case == "none-found"


def test_a_cold_start_has_nothing_of_the_weights():
    """Cold references depend on the stations alone: a block that computes the same from other weights."""
    model = ZOO["plain"]()
    twin = ZOO["plain"]()
    order = torch.randperm(4 * 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for block in twin.blocks:
            first, last = block.feed_forward[0], block.feed_forward[2]
            first.weight.copy_(first.weight[order])
            first.bias.copy_(first.bias[order])
            last.weight.copy_(last.weight[:, order])
    settings = dataclasses.replace(QUICK, start="cold", maps=(DIRECT,), controls=False, rounds=2)
    losses = [run_peel(m, tiny_probe(), settings).record.maps[0].own_head.report for m in (model, twin)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-2)  # changes are rounded around other weights
    assert losses[0] != run_peel(model, tiny_probe(), QUICK).record.loss.current


# -- theorems with their controls ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken_record(stored_stage, training_probe):
    model, _ = stored_stage("final")
    chosen = ((1, 2, 3, 4, 5, 6), (1, 2, 5, 5, 5, 6), (1, 2, 3, 4, 6, 6))
    probe = part_of(training_probe, fit=24, select=8, report=24)
    return run_peel(damage.sign_flip(model, 3), probe, PeelSettings(600.0, maps=chosen, rounds=1)).record


def test_a_damaged_model_is_beaten_by_a_map_that_passes_the_damage_by(broken_record):
    record = broken_record
    assert record.best_map == (1, 2, 5, 5, 5, 6)
    assert record.loss.over_head_control.low > 0.05
    assert record.loss.bound_gain.low > 0.05
    assert record.informative
    assert record.conclusion.case == "certified"
    verdicts = {block.index: block.verdict for block in record.blocks}
    assert verdicts[3] == "misleading"
    assert verdicts[4] == "needed"


def test_the_healthy_model_is_not_beaten(stored_stage, training_probe):
    model, _ = stored_stage("final")
    chosen = ((1, 2, 3, 4, 5, 6), (1, 2, 5, 5, 5, 6), (1, 2, 3, 4, 6, 6))
    probe = part_of(training_probe, fit=12, select=5, report=14)
    record = run_peel(model, probe, PeelSettings(600.0, maps=chosen, rounds=1, controls=False)).record
    assert record.best_map == (1, 2, 3, 4, 5, 6)
    assert record.conclusion.case == "none-found"
    assert record.loss.over_head_control.mean == 0
    assert {b.verdict for b in record.blocks if b.lost_nats} == {"needed"}


def test_shuffled_targets_and_labels_gain_nothing_on_the_healthy_model(stored_stage, training_probe):
    model, _ = stored_stage("final")
    probe = part_of(training_probe, fit=10, select=4, report=10)
    record = run_peel(model, probe, PeelSettings(600.0, maps=((6,) * 6,), rounds=1)).record
    assert record.loss.shuffled > record.loss.current
    assert record.loss.over_untrained.low > 0
    assert record.informative is False  # started warm and led nowhere, the control stays near the model


def test_the_report_prints_and_becomes_a_frame():
    report = peelwise.peel(
        ZOO["llama"](), tiny_probe(), PeelSettings(maps=[DIRECT, ALL_TO_LAST], rounds=1, controls=False)
    )
    assert "maps visited" in str(report)
    frame = report.to_frame()
    assert list(frame.index) == [" ".join(map(str, m.stations)) for m in report.record.maps]
    assert {"report", "over_head_mean", "over_model_low", "seconds"} <= set(frame.columns)
    assert PeelRecord.model_validate_json(report.to_json()) == report.record


# -- the same numbers ------------------------------------------------------------------------------------------


def test_same_seed_same_record_and_micro_batches_do_not_matter(stored_stage, training_probe):
    model, _ = stored_stage("middle")
    probe = part_of(training_probe, fit=6, select=3, report=8)
    settings = PeelSettings(600.0, maps=((1, 2, 3, 6, 6, 6),), rounds=1, controls=False)
    whole, again, small = (
        run_peel(model, probe, dataclasses.replace(settings, micro_batch_tokens=n)).record for n in (10**5, 10**5, 1)
    )
    assert numbers(again) == numbers(whole)
    expected = dict(flat(numbers(whole)))
    for path, value in flat(numbers(small)):
        close = pytest.approx(expected[path], rel=2e-2, abs=1e-4) if isinstance(value, float) else expected[path]
        assert value == close, path


def test_padding_does_not_reach_the_record():
    plain = Probe.from_tokens(sample_ids(40, 17).tolist(), seed=0)
    longer = dataclasses.replace(plain, **{part: padded(getattr(plain, part)) for part in ("fit", "select", "report")})
    first, second = (run_peel(ZOO["llama"](), probe, QUICK).record for probe in (plain, longer))
    for name in ("current", "head_control", "bound", "shuffled", "untrained"):
        assert getattr(second.loss, name) == pytest.approx(getattr(first.loss, name), abs=1e-3), name


def padded(split, extra=9):
    more = torch.full((split.sequences, extra), VOCABULARY - 1)
    mask = torch.cat([split.mask, torch.zeros_like(more, dtype=torch.bool)], dim=1)
    return dataclasses.replace(split, ids=torch.cat([split.ids, more], dim=1), mask=mask)


# -- stopping --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["head-control", "maps", "shuffled-control", "untrained-control"])
def test_ctrl_c_reports_what_was_finished(stage):
    model = ZOO["llama"]()
    before = Snapshot.of(model)

    def watch(progress):
        if progress.stage == stage:
            raise KeyboardInterrupt

    record = run_peel(model, tiny_probe(), QUICK, watcher=watch).record
    before.assert_unchanged(model)
    assert not record.complete
    assert record.notes[-1].code == "stopped"
    assert (record.loss.bound is None) == (stage in ("head-control", "maps"))
    if record.loss.bound is None:
        assert record.conclusion.case == "not-measured"


def test_an_error_leaves_the_model_alone():
    model = ZOO["llama"]()
    before = Snapshot.of(model)

    def watch(progress):
        if progress.stage == "shuffled-control":
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run_peel(model, tiny_probe(), QUICK, watcher=watch)
    before.assert_unchanged(model)


def test_a_budget_that_ends_inside_a_map_keeps_the_maps_before():
    settings = PeelSettings(0.05, maps=(DIRECT, ALL_TO_LAST), rounds=500, controls=False)
    record = run_peel(ZOO["llama"](), tiny_probe(200), settings).record
    assert not record.complete
    assert {note.code for note in record.notes} & {"budget-ended", "map-unfinished"}


def test_large_heads_are_fitted_for_the_best_maps_only(monkeypatch):
    monkeypatch.setattr(visits, "HEADS_OF_LARGE", 2)
    monkeypatch.setattr(visits, "_LARGE_HEAD", 0.0)
    record = run_peel(ZOO["llama"](), tiny_probe(), PeelSettings(600.0, rounds=1)).record
    assert len(record.maps) == 2 ** (BLOCKS - 1)
    fitted = [m for m in record.maps if m.loss]
    assert len(fitted) in (2, 3)  # the direct map has the head control's
    assert record.best_map in [m.stations for m in fitted]
    assert any(note.code == "few-heads" for note in record.notes)
    assert all(b.lost_nats for b in record.blocks)  # measured with the model's own head, which every map has


# -- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("maps", "words"),
    [
        ([[1, 2]], "expected 3 integers"),
        ([[1, 1, 3]], "backwards at layer 2"),
        ([[3, 2, 3]], "decreases"),
        ([[1, 2, 4]], "beyond the targets"),
        ([[1, 2, 3.0]], "expected 3 integers"),
        ([1, 2, 3], "Put the map in a list"),
        ([], "expected a list of maps"),
        ("all", 'expected "auto"'),
        ("a,b", 'expected "auto"'),
        ("", 'expected "auto"'),
    ],
)
def test_bad_maps_are_named(maps, words):
    with pytest.raises(MapError, match=words):
        peelwise.peel(ZOO["llama"](), tiny_probe(), PeelSettings(maps=maps))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": "hot"}, 'start: expected "warm" or "cold"'),
        ({"rounds": 0}, "rounds: expected at least 1"),
        ({"beam_width": 0}, "beam_width: expected at least 1"),
        ({"budget": "soon"}, "budget"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(PeelwiseError, match=words):
        PeelSettings(**options)


def test_tokens_outside_the_vocabulary_and_nan_weights_are_named():
    ids = sample_ids(28, 17) + 10
    with pytest.raises(PeelwiseError, match="vocabulary"):
        peelwise.peel(ZOO["llama"](), Probe.from_tokens(ids))
    model = ZOO["llama"]()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(PeelwiseError, match=r"layers\.1\.mlp\.down_proj"):
        peelwise.peel(model, tiny_probe())


def test_no_cold_start_without_a_way_to_initialise():
    model = ZOO["plain"]()
    model.blocks[0].norm_1.reset_parameters = None
    with pytest.raises(UnsupportedModelError, match='start="warm"'):
        peelwise.peel(model, tiny_probe(), PeelSettings(start="cold"))
