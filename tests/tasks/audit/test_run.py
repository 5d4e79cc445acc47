"""Whole audits: every architecture, every way of stopping, and a damage that must be found."""

import contextlib
import dataclasses
import math
import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import damage
from audits import ONE_ROUND, Snapshot, flat, numbers, part_of, tiny_probe
from peelwise.certificate.audit import verify_certificate
from peelwise.certificate.base import write_certificate
from peelwise.errors import ModelError, ProbeError, UnsupportedModelError
from peelwise.model.architectures import find_blocks
from peelwise.model.runner import Runner
from peelwise.probe.probe import Probe
from peelwise.records.audit import AuditRecord
from peelwise.records.base import note
from peelwise.show.audit.words import conclusion
from peelwise.show.words import note_words
from peelwise.tasks.audit.run import run_audit
from peelwise.tasks.audit.settings import AuditSettings
from zoo import BLOCKS, UNSUPPORTED, VOCABULARY, ZOO, sample_ids


@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_is_audited_and_left_alone(name):
    model = ZOO[name]()
    before = Snapshot.of(model)
    outcome = run_audit(model, tiny_probe(), ONE_ROUND, name=name)
    before.assert_unchanged(model)
    record = outcome.record
    assert record.complete
    assert len(record.blocks) == BLOCKS
    assert all(math.isfinite(value) for _, value in flat(record.model_dump()) if isinstance(value, float))
    assert all(block.recoverable_nats and block.energy > 0 for block in record.blocks)
    assert all(sum(m.share for m in b.matrices) == pytest.approx(1) for b in record.blocks if b.held_out_energy > 0)
    assert None not in (record.loss.shuffled, record.loss.untrained, record.informative if record.loss.composed else 0)
    assert (record.head is None) == (name == "gemma2")  # its logits are capped behind the head
    assert all(tensor.isfinite().all() for tensor in outcome.witness.values())


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_refused_and_left_alone(name):
    model = UNSUPPORTED[name]()
    before = Snapshot.of(model)
    with pytest.raises(UnsupportedModelError):
        run_audit(model, tiny_probe(), ONE_ROUND)
    before.assert_unchanged(model)


# -- the same numbers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcome():
    return run_audit(ZOO["llama"](), tiny_probe(), ONE_ROUND)


def test_same_seed_same_record(outcome):
    again = run_audit(ZOO["llama"](), tiny_probe(), ONE_ROUND)
    assert numbers(again.record) == numbers(outcome.record)
    assert all(torch.equal(again.witness[name], tensor) for name, tensor in outcome.witness.items())
    other = run_audit(ZOO["llama"](), tiny_probe(seed=1), ONE_ROUND)
    assert numbers(other.record) != numbers(outcome.record)


def test_micro_batches_do_not_matter(stored_stage, training_probe):
    """On text that the model knows: on random tokens, steps are chosen by differences as small as rounding."""
    model, _ = stored_stage("middle")
    probe = part_of(training_probe, fit=12, select=4, report=10)
    settings = dataclasses.replace(ONE_ROUND, controls=False)
    small, whole = (
        dict(flat(numbers(run_audit(model, probe, dataclasses.replace(settings, micro_batch_tokens=n)).record)))
        for n in (1, 100_000)
    )
    assert small.keys() == whole.keys()
    for path, value in small.items():
        # Nats, but for a pure number of order 1; ends of intervals follow that one.
        rounding = {"skewness": 1e-2, "low": 1e-4, "high": 1e-4}.get(path.rpartition(".")[2], 1e-5)
        close = pytest.approx(whole[path], rel=1e-3, abs=rounding) if isinstance(value, float) else whole[path]
        assert value == close, path


def test_padding_does_not_reach_the_record():
    """Sequences of one length, and the same again with one longer sequence in the part that only reports."""
    rows = sample_ids(40, 17).tolist()
    plain = Probe.from_tokens(rows, seed=0)
    longer = dataclasses.replace(
        plain, **{part: padded(getattr(plain, part), 9) for part in ("fit", "select", "report")}
    )
    first, second = (run_audit(ZOO["llama"](), probe, ONE_ROUND).record for probe in (plain, longer))
    assert second.probe.report_tokens == first.probe.report_tokens
    for name in ("current", "composed", "shuffled", "head_control"):
        assert getattr(second.loss, name) == pytest.approx(getattr(first.loss, name), abs=1e-4), name
    for a, b in zip(first.blocks, second.blocks, strict=True):
        assert b.energy == pytest.approx(a.energy, rel=1e-3)
        assert b.recoverable_nats.mean == pytest.approx(a.recoverable_nats.mean, abs=1e-4)


def padded(split, extra):
    """Return a split with ``extra`` positions of padding, whose ids are no more likely than others."""
    more = torch.full((split.sequences, extra), VOCABULARY - 1)
    return dataclasses.replace(
        split,
        ids=torch.cat([split.ids, more], dim=1),
        mask=torch.cat([split.mask, torch.zeros_like(more, dtype=torch.bool)], dim=1),
    )


# -- stopping ------------------------------------------------------------------------------------------------

STAGES = [
    "statistics",
    "ablation",
    "joint-rounds",
    "leave-one-out",
    "shuffled-control",
    "untrained-control",
    "head",
    "solo-rounds",
]
FIRST = "losses"
BEFORE = "self-checks"


class Stopper:
    """A watcher that raises at the last report of progress of a stage (``at=-1``) or at its first (``at=0``)."""

    def __init__(self, stage, at, error, reports):
        self.stage, self.error = stage, error
        self.countdown = range(reports)[at] if stage else -1

    def __call__(self, progress):
        if progress.stage == self.stage:
            if self.countdown == 0:
                raise self.error
            self.countdown -= 1


@pytest.fixture(scope="module")
def reports_per_stage():
    seen: list[str] = []
    run_audit(ZOO["plain"](), tiny_probe(), ONE_ROUND, watcher=lambda progress: seen.append(progress.stage))
    assert list(dict.fromkeys(seen)) == [BEFORE, FIRST, *STAGES]
    return {stage: seen.count(stage) for stage in seen}


@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_leaves_a_valid_report_of_what_was_finished(stage, at, reports_per_stage, tmp_path):
    model = ZOO["plain"]()
    before = Snapshot.of(model)
    stopper = Stopper(stage, at, KeyboardInterrupt, reports_per_stage[stage])
    outcome = run_audit(model, tiny_probe(), ONE_ROUND, watcher=stopper)
    before.assert_unchanged(model)
    record = outcome.record
    assert not record.complete
    assert record.notes[0] == note("stopped")
    reached = STAGES.index(stage)
    assert (record.blocks[0].energy is None) == (reached == 0)
    assert all((b.unique_nats is None) for b in record.blocks) or reached >= STAGES.index("leave-one-out")
    write_certificate(tmp_path / "stopped", record, outcome.witness, outcome.probe)
    assert AuditRecord.model_validate_json(record.to_json()) == record
    assert verify_certificate(tmp_path / "stopped", model, full=True).holds


@pytest.mark.parametrize("stage", [BEFORE, FIRST, *STAGES])
def test_an_error_is_passed_on_and_nothing_stays_behind(stage, reports_per_stage):
    model = ZOO["plain"]().train()
    before = Snapshot.of(model)
    with pytest.raises(RuntimeError, match="in the way"):
        run_audit(
            model,
            tiny_probe(),
            ONE_ROUND,
            watcher=Stopper(stage, -1, RuntimeError("in the way"), reports_per_stage[stage]),
        )
    before.assert_unchanged(model)


def test_ctrl_c_before_the_model_is_known_reports_nothing():
    model = ZOO["plain"]()
    before = Snapshot.of(model)
    with pytest.raises(KeyboardInterrupt):
        run_audit(model, tiny_probe(), ONE_ROUND, watcher=Stopper(FIRST, 0, KeyboardInterrupt, 1))
    before.assert_unchanged(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [1, 16, 24, 40, 60])
def test_stopped_inside_a_forward_pass(calls, error):
    """Here weights are spliced in at the moment it happens, most of the time."""
    model, seen = ZOO["plain"](), []

    def count(*_):
        seen.append(1)
        if len(seen) == calls:
            raise error

    model.head.register_forward_hook(count)
    before = Snapshot.of(model)
    passed_on = error is RuntimeError or calls == 1  # Ctrl-C once the model's own losses are known is no error
    with pytest.raises(error) if passed_on else nullcontext():
        outcome = run_audit(model, tiny_probe(), ONE_ROUND)
        assert not outcome.record.complete
    assert len(seen) == calls
    before.assert_unchanged(model)


def test_a_budget_that_is_too_small_is_said_and_reported(tmp_path):
    settings = dataclasses.replace(ONE_ROUND, budget=1e-3, joint_rounds=4)
    model = ZOO["llama"]()
    outcome = run_audit(model, tiny_probe(), settings)
    record = outcome.record
    assert not record.complete
    assert record.notes[-1] == note("budget-ended")
    assert len(record.rounds) == 0
    assert all(b.verdict == "grey" and b.recoverable_nats is None and b.energy is None for b in record.blocks)
    write_certificate(tmp_path / "nothing", record, outcome.witness, outcome.probe)
    assert verify_certificate(tmp_path / "nothing", model).holds


def test_a_budget_spent_within_the_sweep_leaves_the_upper_blocks_measured():
    def spend(progress):
        if progress.stage == "statistics" and progress.done == 2:
            time.sleep(max(progress.left_seconds, 0.0))

    settings = dataclasses.replace(ONE_ROUND, budget=3.0)
    record = run_audit(ZOO["llama"](), tiny_probe(), settings, watcher=spend).record
    assert not record.complete
    assert [block.energy is None for block in record.blocks] == [True] * (BLOCKS - 2) + [False] * 2
    assert record.blocks[0].matrices == ()
    assert record.blocks[0].unique_nats is None


# -- what it is given ----------------------------------------------------------------------------------------


def test_fewer_tokens_than_inputs_leave_a_note_and_a_valid_result():
    record = run_audit(ZOO["llama"](), tiny_probe(length=2), ONE_ROUND).record
    (few,) = [found for found in record.notes if found.code == "few-fit-tokens"]
    assert (few.code, few.values["tokens"], few.values["inputs"]) == ("few-fit-tokens", 28, 48)
    assert few.values["more"] == 11  # one for each of 3 x 4 inputs, whatever the number of rounds
    said = note_words(few)
    assert "28 fit tokens for 48 inputs" in said
    assert "(And 11 more like it.)" in said
    assert all(math.isfinite(value) for _, value in flat(record.model_dump()) if isinstance(value, float))


def test_enough_tokens_leave_no_note(outcome):
    assert outcome.record.notes == ()


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        (lambda: tiny_probe(length=200), r"200 tokens, the model's context is 128"),
        (lambda: Probe.from_tokens(sample_ids(28, 17) + 1), r"0\.\.96, the vocabulary of this model, got 97"),
    ],
)
def test_probe_that_does_not_fit_the_model(probe, words):
    with pytest.raises(ProbeError, match=words):
        run_audit(ZOO["gpt2"](), probe(), ONE_ROUND)


# -- the theorem, with a control -----------------------------------------------------------------------------

DAMAGES = {
    "sign flip": (damage.sign_flip, 3),
    "noise": (lambda model, block: damage.noise(model, block, 1.0), 4),
}
DEPTH = AuditSettings(600.0, joint_rounds=2, solo_rounds=0, controls=False)


@pytest.fixture(scope="module")
def healthy(stored_stage, training_probe):
    return run_audit(stored_stage("final")[0], training_probe, DEPTH).record


@pytest.mark.parametrize("name", ["sign flip", pytest.param("noise", marks=pytest.mark.nightly)])
def test_a_damaged_block_is_found(name, healthy, small_gpt, training_probe):
    """Statistic: ``unique``, what only one block gives back once all are refined together.

    A block in the middle of the stack: damage in block 1 is given back by block 0 as well.
    """
    break_block, index = DAMAGES[name]
    damaged = break_block(small_gpt("final")[0], index)
    record = run_audit(damaged, training_probe, DEPTH).record
    gained = record.loss.composed_gain
    assert record.loss.current > healthy.loss.current + 0.3
    assert gained.low > record.margin_nats
    assert gained.low > healthy.loss.composed_gain.high + 0.1 if healthy.loss.composed_gain else gained.low > 0.1
    first = max(record.blocks, key=lambda block: block.unique_nats.mean)
    at_fault = record.blocks[index]
    assert first is at_fault or (abs(first.index - index) == 1 and at_fault.unique_nats.high >= first.unique_nats.low)
    assert at_fault.unique_nats.low > record.margin_nats
    distant = [block for block in record.blocks if abs(block.index - index) > 1]
    assert all(block.unique_nats.mean < at_fault.unique_nats.low for block in distant)
    # A factor on what it writes comes before anything is refined.
    assert {n.values["block"] for n in record.notes if n.code == "factor-first"} == {index}
    # Gradients are those of the model as it stands, not of the one with the factor.
    damaged.requires_grad_(True)
    part = training_probe.fit
    losses = F.cross_entropy(damaged(part.inputs).logits.flatten(0, 1), part.targets.flatten(), reduction="none")
    (losses * part.weights.flatten()).sum().div(part.weights.sum()).backward()
    for block, found in zip(find_blocks(damaged), record.blocks, strict=True):
        norm = sum(float(linear.parameter.grad.square().sum()) for linear in block.linears) ** 0.5
        assert found.gradient_norm == pytest.approx(norm, rel=1e-3)
    # So does taking it out: damage as heavy as this does harm, and the conclusion names it.
    assert min(record.blocks, key=lambda block: block.removal_nats.mean) is at_fault
    assert at_fault.removal_nats.high < -record.margin_nats
    assert f"The model is better without block {index} (" in conclusion(record)
    assert record.conclusion.harmful[0] == index


@pytest.mark.parametrize(
    "name", ["reset", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("stale", "scale 0.7", "scale 1.3"))]
)
def test_lighter_damage_is_certified_in_its_block_or_beside_it(name, healthy, small_gpt, training_probe):
    """A stale block costs only 0.1 nats, which its neighbours can give back as well: there intervals decide."""
    index = 3
    damaged = damage.STANDARD[name](small_gpt("final")[0], index, small_gpt("early")[0])
    record = run_audit(damaged, training_probe, DEPTH).record
    assert record.loss.current > healthy.loss.current
    assert record.loss.composed_gain.low > record.margin_nats
    first = max(record.blocks, key=lambda block: block.unique_nats.mean)
    at_fault = record.blocks[index]
    assert first is at_fault or (abs(first.index - index) == 1 and at_fault.unique_nats.high >= first.unique_nats.low)


def test_the_healthy_model_has_no_block_at_fault(healthy):
    """The control: the same audit, where nothing is broken."""
    assert healthy.loss.composed_gain is None or healthy.loss.composed_gain.low < healthy.margin_nats
    measured = [block.unique_nats for block in healthy.blocks if block.unique_nats]
    assert all(unique.low < healthy.margin_nats for unique in measured)
    assert all(block.removal_nats.low > 0 for block in healthy.blocks)


def test_a_block_taken_out_is_a_block_whose_outputs_are_zero(small_gpt, training_probe):
    """So removal is a witness too, of the same shape: it can be checked with weights of zero."""
    model = small_gpt("final")[0]
    runner = Runner(model, find_blocks(model))
    with torch.no_grad():
        without = runner.losses_without(runner.trace(training_probe.select), 2)
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
        assert torch.allclose(without, runner.trace(training_probe.select).losses, rtol=1e-6)


@pytest.mark.nightly
def test_a_factor_on_what_is_unlike_comes_first_and_singles_out_the_block(small_gpt, training_probe, tmp_path):
    """On text that is not known to be training text; the sign is turned back, and nobody else has anything left."""
    broken = damage.sign_flip(small_gpt("final")[0], 3)
    probe = dataclasses.replace(training_probe, in_distribution=False)
    outcome = run_audit(broken, probe, dataclasses.replace(ONE_ROUND, controls=False))
    record = outcome.record
    assert record.blocks[3].verdict == "red"
    assert record.blocks[3].unique_nats.low > 1
    assert all(block.unique_nats.high < record.margin_nats for block in record.blocks if block.index != 3)
    assert (record.conclusion.look_first.block, record.conclusion.look_first.tied) == (3, ())
    found = [remark.values for remark in record.notes if remark.code == "factor-first"]
    assert [(values["block"], values["factor"]) for values in found] == [(3, -1.0), (3, -1.0)]
    assert record.rounds[0].direction == "factors"
    healthy = run_audit(small_gpt("final")[0], probe, dataclasses.replace(ONE_ROUND, controls=False)).record
    assert not any(remark.code == "factor-first" for remark in healthy.notes)
    assert record.loss.composed == pytest.approx(healthy.loss.current, abs=0.02)
    write_certificate(tmp_path / "found", record, outcome.witness, outcome.probe)
    assert verify_certificate(tmp_path / "found", broken, full=True).holds
    again = verify_certificate(tmp_path / "found", broken, replay=True)
    assert again.holds, again.reason
    assert again.replay.differing == 0


@pytest.mark.nightly
def test_without_solo_rounds_a_factor_alone_is_no_gap_in_a_complete_audit(small_gpt, training_probe, tmp_path):
    broken = damage.sign_flip(small_gpt("final")[0], 3)
    outcome = run_audit(broken, training_probe, dataclasses.replace(ONE_ROUND, controls=False, solo_rounds=0))
    assert outcome.record.complete
    assert [block.index for block in outcome.record.blocks if block.recoverable_nats is not None] == [3]
    write_certificate(tmp_path / "found", outcome.record, outcome.witness, outcome.probe)
    found = verify_certificate(tmp_path / "found", broken, full=True)
    assert found.holds, found.reason


def test_an_audit_begins_with_a_check_and_names_the_block_that_is_unlike(audited: Any) -> None:
    check = audited[0].record.check
    assert check is not None
    assert len(check.scores) == len(check.signals) == 6
    assert {"weight_rms.mlp.down_proj", "gain_slope.mlp", "block_influence"} <= check.signals[3].keys()
    assert [each.block for each in check.unlike][:1] == [3]
    assert max(range(6), key=lambda i: check.scores[i]) == 3
    assert all(each.score >= check.threshold for each in check.unlike)
    names = [stage.name for stage in audited[0].record.cost.stages]
    assert names.index("pass-signals") < names.index("statistics")
    assert "Block 3 is unlike its neighbours" in str(audited[0])


@pytest.mark.parametrize("layer", ["up_proj", "down_proj"])
def test_activations_whose_squares_overflow_end_in_a_result_or_in_one_line(layer):
    """Their loss is finite, since a norm follows; sums over them in float32 are not."""
    model = ZOO["llama"]()
    with torch.no_grad():
        getattr(model.model.layers[1].mlp, layer).weight.mul_(1e19)
    with contextlib.suppress(ModelError):
        outcome = run_audit(model, tiny_probe(), ONE_ROUND)
        assert AuditRecord.model_validate_json(outcome.record.to_json()) == outcome.record
