"""A number within the tolerance holds, one outside does not, whatever was measured."""

from audits import session_of
from peelwise.certificate.recheck import Recheck
from zoo import ZOO

TOLERANCE = 1e-3


def test_only_what_is_off_by_more_than_the_tolerance_is_named():
    session = session_of(ZOO["plain"]())
    mean = session.report.mean
    recheck = Recheck(session, TOLERANCE)
    recheck.loss("near", mean + 0.9 * TOLERANCE, session.report.losses)
    assert recheck.wrong_number() is None
    recheck.loss("far", mean + 1.1 * TOLERANCE, session.report.losses)
    recheck.loss("far too", mean + 9 * TOLERANCE, session.report.losses)
    assert recheck.wrong_number().startswith("far: ")
    assert [check.holds for check in recheck.checks] == [True, False, False]


def test_a_gain_is_compared_with_its_ends_and_handed_back():
    session = session_of(ZOO["plain"]())
    before, after = session.report.losses, 0.5 * session.report.losses
    found = session.gain(before, after).interval()
    recheck = Recheck(session, TOLERANCE)
    assert recheck.gain("gain", found.model_copy(update={"high": found.high + 1}), before, after).interval() == found
    assert [(check.name, check.holds) for check in recheck.checks] == [
        ("gain.mean", True),
        ("gain.low", True),
        ("gain.high", False),
    ]
    assert recheck.gain("not recorded", None, before, after).interval() == found
    assert len(recheck.checks) == 3
