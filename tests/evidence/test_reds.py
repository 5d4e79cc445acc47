"""Red blocks are told when they begin, when their time has doubled, when they end, and as one where most are red."""

from peelwise.evidence.events import Seen
from peelwise.evidence.intervals import Paired
from peelwise.evidence.reds import RedBlock, Reds


def red(gain=0.03, skewness=0.0):
    return RedBlock(Paired(gain, 0.002, 12, skewness).interval(), None, 0, Seen())


def blocks(count, reds):
    return [red(0.03 + block / 100) if block in reds else "green" for block in range(count)]


def kinds(events):
    return [(event.kind, event.block) for event in events]


def test_one_of_six_is_told_by_itself_at_doublings_and_at_the_end():
    reds = Reds()
    told = {step: kinds(reds.events(step, blocks(6, [2]))) for step in range(0, 90, 10)}
    assert {step for step, events in told.items() if events} == {0, 10, 20, 40, 80}
    assert kinds(reds.events(90, blocks(6, []))) == [("no-longer-red", 2)]


def test_most_of_six_are_told_once_with_what_they_share():
    reds = Reds()
    (event,) = reds.events(5, blocks(6, [0, 1, 3]), "the highest learning rate is 1e-06")
    assert (event.kind, event.block, event.level) == ("red", None, "alert")
    assert "3 of 6 blocks (0, 1, 3) are red" in event.text
    assert "0.0600 [" in event.text  # the largest gain, with both its ends
    assert event.suggestion == "What they share: the highest learning rate is 1e-06."
    assert reds.events(6, blocks(6, [0, 1, 3, 4])) == []
    assert "5 of 6 blocks (0, 1, 2, 3, 4) have been red for 2 steps" in reds.events(7, blocks(6, range(5)))[0].text
    assert reds.events(8, blocks(6, [])) == []


def test_two_of_two_blocks_are_no_most():
    assert kinds(Reds().events(5, blocks(2, [0, 1]))) == [("red", 0), ("red", 1)]


def test_frozen_blocks_are_not_counted():
    assert len(Reds().events(5, [red(), red(), red(), "frozen", "frozen", "frozen", "frozen"])) == 1


def test_a_known_common_cause_is_not_told_again_and_what_stays_without_it_is():
    reds = Reds()
    assert reds.events(5, blocks(6, [0, 1, 3]), quiet=True) == []
    assert reds.events(6, blocks(6, [2]), quiet=True) == []
    assert kinds(reds.events(9, blocks(6, [0, 1, 3]))) == [("red", None)]
    assert kinds(reds.events(10, blocks(6, [3]))) == [("red", 3)]


def test_a_block_with_a_cause_of_its_own_is_told_beside_the_others():
    own = RedBlock(Paired(0.09, 0.002, 12).interval(), None, 0, Seen("frozen"))
    events = Reds().events(5, [red(), red(), own, red(), "green"])
    assert kinds(events) == [("red", 2), ("red", None)]
    assert "has frozen parameters" in events[0].suggestion
    assert "3 of 5 blocks (0, 1, 3)" in events[1].text


def test_lopsided_intervals_are_told_with_both_ends():
    lopsided = red(0.093, skewness=2.5)
    (event,) = Reds().events(5, [lopsided, "green"])
    low, high = lopsided.gain.low, lopsided.gain.high
    assert high - 0.093 > 1.1 * (0.093 - low)
    assert f"0.0930 [{low:.4f}, {high:.4f}] nats" in event.text
