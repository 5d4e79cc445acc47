"""Damage that other weights of linear layers cannot mend: an audit says what it does not know, and what text costs."""

from __future__ import annotations

import copy
import math

import pytest

import peelwise
from audits import ONE_ROUND, part_of, session_of, tiny_probe
from peelwise.engine.baselines import probe_unigram
from peelwise.show.audit.words import conclusion
from peelwise.tasks.audit.controls import embedding_baseline
from zoo import ZOO


def exchanged(model):
    layers = model.model.layers
    layers[2], layers[3] = layers[3], layers[2]
    return model


@pytest.fixture(scope="module")
def audits(stored_stage, training_probe):
    probe = part_of(training_probe, fit=12, select=5, report=12)

    def audit(damage):
        return peelwise.audit(damage(copy.deepcopy(stored_stage("final")[0])), probe, ONE_ROUND)

    return {name: audit(damage) for name, damage in {"healthy": lambda m: m, "exchanged": exchanged}.items()}


def test_a_trained_model_is_below_both_baselines(audits, training_probe):
    loss = audits["healthy"].record.loss
    assert loss.current + 1 < min(loss.without_blocks, loss.unigram) < math.log(1024)
    assert audits["healthy"].record.conclusion.above is None
    said = conclusion(audits["healthy"].record)
    assert "does not mean undamaged" in said
    assert f"one who only counts tokens {loss.unigram:.3f} nats per token and this model {loss.current:.3f}" in said


def test_exchanged_blocks_are_not_called_healthy(audits):
    """Such a model is far below the baselines, so nothing but the sentence says that it may be damaged."""
    healthy, broken = (audits[name].record for name in ("healthy", "exchanged"))
    assert broken.loss.current > healthy.loss.current + 0.1
    said = conclusion(broken)
    assert "does not mean undamaged" in said or all(b.verdict in ("red", "yellow") for b in broken.blocks)


def test_an_untrained_model_is_above_both_and_told_so():
    report = peelwise.audit(ZOO["llama"](), tiny_probe(), ONE_ROUND)
    loss = report.record.loss
    assert loss.current > max(loss.unigram, loss.without_blocks)
    assert report.record.conclusion.above in ("unigram", "without-blocks")
    assert "look first outside of the linear layers" in conclusion(report.record)
    assert loss.unigram == pytest.approx(probe_unigram(report.probe, ZOO["llama"]()))


def test_a_baseline_that_would_take_too_long_is_left_out():
    session = session_of(ZOO["llama"]())
    with session.clock.stage("losses"):
        session.runner.trace(session.probe.fit)
    assert embedding_baseline(session, share=1.0) is not None
    assert embedding_baseline(session, share=1e-12) is None


@pytest.mark.nightly
def test_a_wrong_rotary_base_is_not_blamed_on_a_block(stored_stage, training_probe):
    """Every block can make up for it, so every one is red, and none of them is at fault."""
    model = stored_stage("final")[0]
    config = copy.deepcopy(model.config)
    config.rope_parameters["rope_theta"] = 100.0
    broken = type(model)(config).eval()
    broken.load_state_dict(model.state_dict())
    settings = peelwise.AuditSettings(joint_rounds=1, solo_rounds=1, controls=False)
    report = peelwise.audit(broken, part_of(training_probe, fit=30, select=10, report=20), settings)
    assert sum(block.verdict == "red" for block in report.record.blocks) >= 3
    assert "first rule out what they share" in report.conclusion
    assert "rotary base" in report.conclusion
    assert "Look first at block" not in report.conclusion
    assert f"and this model {report.record.loss.current:.3f}" in report.conclusion
