"""The session's door: what it says is what the model loses with the changes written into its weights."""

import pytest
import torch

from audits import Snapshot, random_changes, session_of, written
from peelwise.engine.opening import open_report, untrained_session
from peelwise.model.architectures import find_blocks
from zoo import BLOCKS, ZOO


@pytest.fixture(scope="module")
def opened():
    model = ZOO["llama"]()
    session = session_of(model)
    return model, session, of_session(session, random_changes(model)[1])


def of_session(session, changes):
    """The same changes, for the maps as this session knows them."""
    by_name = {linear.name: change for linear, change in changes.items()}
    return {linear: by_name[linear.name] for block in session.runner.blocks for linear in block.linears}


def test_losses_and_gains_are_those_of_the_written_weights_and_leave_none(opened):
    model, session, changes = opened
    before = Snapshot.of(model)
    expected = session_of(written(model, changes)).report
    found = session.losses(session.report, changes)
    torch.testing.assert_close(found, expected.losses, rtol=1e-5, atol=1e-4)
    assert session.gain(session.report.losses, found).mean == pytest.approx(
        session.report.mean - expected.mean, abs=1e-4
    )
    torch.testing.assert_close(session.losses(session.report), session.report.losses, rtol=1e-5, atol=1e-4)
    before.assert_unchanged(model)


def test_from_a_block_on_only_what_lies_above_is_changed(opened):
    _, session, changes = opened
    top = set(session.runner.blocks[-1].linears)
    above = {linear: change for linear, change in changes.items() if linear in top}
    found = session.losses(session.report, changes, BLOCKS - 1)
    assert torch.equal(found, session.losses(session.report, above, BLOCKS - 1))
    assert not torch.allclose(found, session.losses(session.report, changes))  # the control


def test_proposals_are_those_of_a_session_on_the_written_weights(opened):
    model, session, changes = opened
    expected = session_of(written(model, changes)).relinearised({})
    found = session.relinearised(changes)
    assert sorted(found) == list(range(BLOCKS))
    for index, block in found.items():
        assert block.signals["energy"] == pytest.approx(expected[index].signals["energy"], rel=1e-3)
    assert found[1].signals["energy"] != pytest.approx(
        session.relinearised({})[1].signals["energy"], rel=0.01
    )  # the control


def test_one_block_by_itself_gets_the_proposals_it_gets_among_all(opened):
    _, session, changes = opened
    own = {linear: change for linear, change in changes.items() if linear in set(session.runner.blocks[1].linears)}
    (index, alone), *others = session.relinearised(own, 1).items()
    assert (index, others) == (1, [])
    assert alone.signals["energy"] == pytest.approx(session.relinearised(own)[1].signals["energy"], rel=1e-6)


def test_a_session_on_report_alone_says_the_same(opened):
    model, session, changes = opened
    light = open_report(model, find_blocks(model), session.probe.report)
    assert torch.equal(light.losses(light.report, of_session(light, changes)), session.losses(session.report, changes))


def test_an_untrained_session_is_charged_to_the_same_clock(opened):
    _, session, _ = opened
    worked = session.clock.work.token_forwards
    fresh = untrained_session(session, session.probe)
    assert fresh.clock is session.clock
    assert session.clock.work.token_forwards > worked
    assert fresh.report.mean != session.report.mean
