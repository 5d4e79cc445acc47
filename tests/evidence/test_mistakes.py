"""Each rule names its mistake from the numbers that show it, at two checks in a row, and nothing in a healthy run."""

from dataclasses import replace

import pytest

from peelwise.evidence.facts import BatchFacts, PulseFacts, StepFacts, UpdateFacts
from peelwise.evidence.intervals import Paired
from peelwise.evidence.mistakes import Diagnosis, leak, shared_words
from peelwise.evidence.trends import Slope

FLAT, FALLING = Slope(-1e-5, -1e-3, 1e-3, 100), Slope(-1e-2, -1.1e-2, -0.9e-2, 100)
UPDATES = UpdateFacts((0.001,) * 5, (0.01,) * 5, (1e-3,) * 5, 1e-3, kept_norm=1.1, stale=0.0)
BATCH = BatchFacts(next=2.0, twice=2.6, same=6.0, unpadded=2.0, padding=0.0, rows=64, repeated=3, distinct=61)


def pulse(loss, twice=-0.5):
    return PulseFacts(Paired(loss, 0.05, 16).interval(), Paired(twice, 0.03, 16).interval())


HEALTHY = StepFacts(100, [2.0] * 8, 2.0, FALLING, 100, 3.0, None, UPDATES, BATCH, pulse(2.1))


def wrong(**changes):
    return replace(HEALTHY, **changes)


def updates(**changes):
    return wrong(updates=replace(UPDATES, **changes))


def batch(**changes):
    return replace(BATCH, **changes)


FAST = updates(moved=(0.001, 0.001, 0.001, 0.1, 0.1), relative=(0.01,) * 3 + (0.8,) * 2, rates=(1e-3,) * 3 + (0.1,) * 2)
SLOW = wrong(updates=replace(UPDATES, relative=(1e-5,) * 5, highest_rate=1e-6), losses=[5.5], loss=5.5, slope=FLAT)
CASES = {
    "rate-too-large": (FAST, "blocks 3 and 4: one step changes their weights by 80%, 100 times the other blocks'"),
    "weights-replaced": (
        updates(alike=(0.99, 0.99, 0.02, 0.98, 0.99), since=50),
        "block 2: its weights are not those of step 50 (cosine 0.02; of the other blocks 0.99)",
    ),
    "rate-too-small": (SLOW, "changes the weights by 1e-05 of their size at a learning rate of 1e-06"),
    "updates-lost": (updates(lost=0.93, dtype="bfloat16"), "93% of the weights that got a gradient did not change"),
    "decay-too-strong": (updates(shrink=0.04, kept_norm=0.4), "takes 4.0% of the weights in every step"),
    "gradients-kept": (updates(stale=1.0), "holds that of the step before (100% of it)"),
    "labels-shifted": (wrong(loss=2.6, batch=batch(next=3.5)), "labels are shifted twice: the training loss (2.60)"),
    "padding-in-loss": (wrong(loss=2.0, batch=batch(unpadded=2.7, padding=0.3)), "would be 2.70 without"),
    "repeated-data": (
        wrong(losses=[0.2], loss=0.2, batch=batch(repeated=60, next=0.2, unpadded=0.2), pulse=pulse(4.5)),
        "60 of 64 sequences of late had been seen before",
    ),
    "worse-than-counting": (wrong(pulse=pulse(3.6), losses=[3.5], loss=2.0, slope=FLAT), "worse than a model without"),
}


def test_a_healthy_run_is_told_nothing_of():
    diagnosis = Diagnosis()
    assert [diagnosis.add(replace(HEALTHY, step=step)) for step in range(5)] == [[]] * 5
    assert diagnosis.present == set()


@pytest.mark.parametrize(
    ("facts", "suspicious"),
    [
        (HEALTHY, False),
        (wrong(losses=[3.1] * 8), True),
        (wrong(losses=[]), True),
        (wrong(batch=None), True),
        (wrong(batch=batch(repeated=60)), True),
        (wrong(batch=batch(rows=20, repeated=20)), False),
    ],
)
def test_the_probes_loss_is_asked_for_where_it_may_show_what_nothing_else_does(facts, suspicious):
    assert facts.suspicious == suspicious


@pytest.mark.parametrize(("labelled_first", "told"), [(1.81, ["padding-in-loss"]), (None, [])])
def test_padding_is_seen_where_labels_were_made_before_it(labelled_first, told):
    """Its first token in each row is no target there, and costs a trained model much."""
    facts = wrong(loss=1.8, batch=batch(next=2.0, labelled_first=labelled_first, unpadded=2.7, padding=0.3))
    diagnosis = Diagnosis()
    assert [event.kind for step in range(3) for event in diagnosis.add(replace(facts, step=step))] == told


@pytest.mark.parametrize("kind", CASES)
def test_each_mistake_is_told_once_at_its_second_check_and_stays_known(kind):
    facts, words = CASES[kind]
    diagnosis = Diagnosis()
    diagnosis.add(replace(HEALTHY, updates=facts.updates, batch=None, pulse=None, loss=None, losses=[]))
    told = [diagnosis.add(replace(facts, step=step)) for step in range(200, 206)]
    events = [event for each in told for event in each]
    assert [event.kind for event in events] == [kind]
    assert words in events[0].text
    assert events[0].text.endswith(".")
    assert events[0].suggestion.endswith(".")
    assert diagnosis.present == {kind}


@pytest.mark.parametrize("kind", [k for k in CASES if k != "rate-too-small"])
def test_one_check_alone_says_nothing(kind):
    diagnosis = Diagnosis()
    for step in range(8):
        assert diagnosis.add(replace(CASES[kind][0] if step % 2 else HEALTHY, step=step)) == []


def test_what_is_mended_is_present_no_more():
    diagnosis = Diagnosis()
    for step in range(3):
        diagnosis.add(replace(CASES["updates-lost"][0], step=step))
    diagnosis.add(wrong(updates=None))  # nothing was seen, so nothing is known
    assert diagnosis.present == {"updates-lost"}
    for _ in range(5):
        assert diagnosis.present == {"updates-lost"}  # a broken run looks well at single moments
        diagnosis.add(HEALTHY)
    assert diagnosis.present == set()


def test_a_rate_that_is_known_to_be_too_large_is_so_until_it_is_well_below():
    less = updates(moved=(0.001,) * 4 + (0.01,), relative=(0.01,) * 4 + (0.005,))
    diagnosis = Diagnosis()
    assert [diagnosis.add(replace(less, step=step)) for step in range(3)] == [[]] * 3
    assert diagnosis.present == set()
    for facts in (FAST, FAST, *[less] * 8):
        diagnosis.add(facts)
    assert diagnosis.present == {"rate-too-large"}


HARMLESS = {
    "a young model is above counting, and falls": wrong(pulse=pulse(5.0), losses=[5.0], loss=5.0, batch=None),
    "a small rate in fine-tuning": wrong(updates=replace(UPDATES, relative=(1e-5,) * 5), slope=FLAT),
    "no slope yet": replace(SLOW, slope=None),
    "a loss that falls too slowly only for the first losses": replace(SLOW, count=10),
    "padding that is masked": wrong(loss=2.7, batch=batch(unpadded=2.7, padding=0.3)),
    "a masked prompt makes another loss": wrong(loss=3.0, losses=[3.0]),
    "several epochs without a gap": wrong(batch=batch(repeated=64)),
    "a gap without repeats": wrong(losses=[0.2], batch=batch(next=0.2, unpadded=0.2), loss=0.2, pulse=pulse(4.5)),
    "a tied embedding first predicts the token itself": wrong(loss=6.0, batch=batch(next=6.0, unpadded=6.0, same=4.0)),
    "other layers move three times as much": updates(moved=(0.001,) * 4 + (0.003,), relative=(0.01,) * 5),
    "some updates are lost": updates(lost=0.3, dtype="bfloat16"),
    "usual decay": updates(shrink=4e-4, kept_norm=0.9),
    "decay that does not shrink anything": updates(shrink=0.04, kept_norm=1.5),
    "gradients that cannot be told apart": updates(stale=None),
}  # fmt: skip


def test_a_rate_far_above_the_others_is_told_where_updates_have_become_smaller():
    """Gradients die where weights explode: the update is then only some ten times the other blocks'."""
    fast = updates(moved=(0.001, 0.001, 0.012, 0.001, 0.001), relative=(0.01, 0.01, 0.004, 0.01, 0.01))
    slow = replace(fast, updates=replace(fast.updates, rates=(1e-3, 1e-3, 1e-2, 1e-3, 1e-3)))
    fast = replace(fast, updates=replace(fast.updates, rates=(1e-3, 1e-3, 0.1, 1e-3, 1e-3)))
    for facts, told in ((fast, ["rate-too-large"]), (slow, [])):
        diagnosis = Diagnosis()
        events = [event for step in (1, 2, 3) for event in diagnosis.add(replace(facts, step=step))]
        assert [event.kind for event in events] == told
        assert all(
            "its weights by 0.40%, 12 times the other blocks'; the learning rate is 100 times" in e.text for e in events
        )


@pytest.mark.parametrize(("rates", "told"), [((1e-3,) * 5, "weights-replaced"), ((), "rate-too-large")])
def test_a_step_that_makes_another_block_is_no_update_where_the_rate_is_that_of_the_others(rates, told):
    moved = updates(moved=(0.001, 0.001, 0.1, 0.001, 0.001), relative=(0.01, 0.01, 1.3, 0.01, 0.01), rates=rates)
    moved = replace(moved, updates=replace(moved.updates, alike=(0.99, 0.98, 0.0, 0.99, 0.99), since=50))
    diagnosis = Diagnosis()
    events = [event for step in (1, 2) for event in diagnosis.add(replace(moved, step=step))]
    assert [(event.kind, event.block) for event in events] == [(told, 2)]


def test_blocks_that_all_move_far_are_not_said_to_be_replaced():
    diagnosis = Diagnosis()
    facts = updates(alike=(0.6, 0.55, 0.3, 0.6, 0.5), since=1)
    assert [diagnosis.add(replace(facts, step=step)) for step in range(3)] == [[]] * 3


@pytest.mark.parametrize("name", HARMLESS)
def test_what_looks_odd_and_is_none_is_not_told(name):
    diagnosis = Diagnosis()
    assert [diagnosis.add(replace(HARMLESS[name], step=step)) for step in range(6)] == [[]] * 6


@pytest.mark.parametrize("rates", [(1e-7, 5e-7, 1e-6, 2e-6), (1e-3, 1e-3, 1e-5, 1e-6)])
def test_a_rate_that_warms_up_or_has_been_decayed_is_not_too_small(rates):
    diagnosis = Diagnosis()
    assert SLOW.updates is not None
    for rate in rates:
        assert diagnosis.add(replace(SLOW, updates=replace(SLOW.updates, highest_rate=rate))) == []


def test_a_cause_that_is_named_is_not_followed_by_its_consequence():
    diagnosis = Diagnosis()
    both = replace(CASES["worse-than-counting"][0], updates=CASES["updates-lost"][0].updates)
    told = [event.kind for step in range(6) for event in diagnosis.add(replace(both, step=step))]
    assert told == ["updates-lost"]


def test_a_leak_is_told_with_what_was_found_and_what_is_shared_in_words():
    assert leak(0, "it reads later tokens.").text == "a leak: it reads later tokens."
    assert shared_words(UPDATES, 1.0).startswith("one step changes the weights by 0.01 of their size; the highest")
    assert shared_words(None, None) == ""
