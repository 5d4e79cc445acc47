"""Blocks that there is no time to refine are bounded by the slope of their direction, and a certificate says so."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

import peelwise
from audits import ONE_ROUND, tiny_probe
from peelwise.certificate.base import write_certificate
from peelwise.evidence.intervals import Paired
from peelwise.evidence.verdict import Evidence, judge
from peelwise.show.audit.terminal import print_record
from peelwise.tasks.audit import stages
from peelwise.tasks.audit.run import run_audit
from zoo import BLOCKS, ZOO

SETTINGS = dataclasses.replace(ONE_ROUND, joint_rounds=0, solo_rounds=1, controls=False)


@pytest.fixture
def outcome(monkeypatch):
    """An audit whose clock leaves time for the block that is refined first, and for no other."""
    ranked = run_audit(ZOO["plain"](), tiny_probe(), dataclasses.replace(SETTINGS, solo_rounds=0)).record
    first = max(ranked.blocks, key=lambda block: block.natural_energy).index
    seconds = lambda session, index, swept: 0.0 if index == first else 1e12  # noqa: E731
    monkeypatch.setattr(stages, "_alone_seconds", seconds)
    return first, run_audit(ZOO["plain"](), tiny_probe(), SETTINGS)


def test_others_get_a_bound_that_their_gain_stays_below(outcome, monkeypatch):
    first, screened = outcome
    monkeypatch.undo()
    whole = run_audit(ZOO["plain"](), tiny_probe(), SETTINGS)
    assert not screened.record.complete
    for said, truth in zip(screened.record.blocks, whole.record.blocks, strict=True):
        assert (said.recoverable_nats is None) == (said.index != first)
        assert (said.first_order_nats is None) == (said.index == first)
        assert truth.first_order_nats is None
        if said.first_order_nats is not None:
            assert truth.recoverable_nats.mean < said.first_order_nats.high


def test_a_certificate_holds_the_direction_and_verify_finds_its_slope_again(outcome, tmp_path):
    _, screened = outcome
    model = ZOO["plain"]()

    def verified(name, witness, *, full):
        write_certificate(tmp_path / name, screened.record, witness, screened.probe)
        return peelwise.verify(tmp_path / name, model, full=full)

    found = verified("certificate", screened.witness, full=True)
    assert found.holds, found.reason
    bounds = {check.name for check in found.checks if check.name.endswith("first-order bound.mean")}
    assert len(bounds) == BLOCKS - 1, found.checks
    assert {name.partition("/")[0] for name in screened.witness} == {"alone", "slope"}
    turned = {n: -t if n.startswith("slope/") else t for n, t in screened.witness.items()}
    assert "first-order bound" in verified("turned", turned, full=True).reason
    without = {n: t for n, t in screened.witness.items() if not n.startswith("slope/")}
    assert "stand together" in verified("without", without, full=False).reason


def test_verdicts_follow_from_bounds_and_say_so(outcome):
    first, screened = outcome
    bounds = [None if b.first_order_nats is None else Paired.of(b.first_order_nats) for b in screened.record.blocks]
    wide = 2 * max(b.interval().high for b in bounds if b)

    def judged(margin):
        return judge([Evidence(bound=bound) for bound in bounds], margin, in_distribution=True)

    assert [v.reason for v in judged(wide)] == ["not-refined" if i == first else "screened" for i in range(BLOCKS)]
    assert {v.colour for v in judged(wide) if v.reason == "screened"} == {"green"}
    assert [v.colour for v in judged(wide / 1e6)] == ["grey"] * BLOCKS
    console = Console(width=140, record=True, file=io.StringIO())
    print_record(screened.record, console)
    assert console.export_text().count("at most +") == BLOCKS - 1
