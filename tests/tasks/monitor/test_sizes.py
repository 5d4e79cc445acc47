"""A measurement begins as small as its budget needs, grows with the run, and is a part of the same probe."""

import pytest
import torch

import peelwise
from audits import tiny_probe
from peelwise.evidence.events import cost
from peelwise.tasks.monitor.sizes import PASSES, affordable_tokens, part_of, tokens_of


@pytest.mark.parametrize(
    ("per_token", "budget", "elapsed", "now", "size"),
    [
        (1e-5, 0.03, 0.0, 0, 12_000),  # a small model pays for all of it at once
        (6e-3, 0.03, 0.0, 0, 1024),  # never less than that
        (5e-5, 0.03, 0.0, 0, 4096),  # 4,500 tokens a minute are paid for
        (1e-4, 0.03, 2400.0, 2048, 4096),  # 4,500 in two
        (1e-4, 0.03, 0.0, 4096, 4096),  # never less than before
        (1e-4, 0.03, 36_000.0, 4096, 12_000),
        (1e-2, None, 0.0, 0, 12_000),
    ],
)
def test_as_much_as_is_paid_for(per_token, budget, elapsed, now, size):
    assert affordable_tokens(12_000, per_token, budget, elapsed, now) == size
    if 1024 < size < 12_000 and size != now:
        assert PASSES * per_token * size <= budget * max(60.0, elapsed / 20)


def test_a_small_probe_is_taken_whole():
    assert affordable_tokens(500, 1.0, 0.01) == 500
    probe = tiny_probe()
    assert part_of(probe, tokens_of(probe)) is probe


def test_a_part_is_the_first_sequences_of_each_part():
    probe = tiny_probe()
    part = part_of(probe, tokens_of(probe) // 2)
    for name in ("fit", "select", "report"):
        whole, few = getattr(probe, name), getattr(part, name)
        assert min(8, whole.sequences) <= few.sequences <= whole.sequences
        assert few.ids.equal(whole.ids[: few.sequences])
    assert part.fingerprint != probe.fingerprint


def test_there_is_twice_as_much_to_report_on():
    ids = torch.randint(40, (400, 9), generator=torch.Generator().manual_seed(0))
    probe = peelwise.Probe.from_tokens(ids, tokens=3_200)
    part = part_of(probe, tokens_of(probe) // 4)
    for name, share in (("fit", 1 / 4), ("select", 1 / 4), ("report", 1 / 2)):
        assert getattr(part, name).sequences == pytest.approx(share * getattr(probe, name).sequences, abs=1)


def test_what_fits_is_said_with_what_is_done():
    whole, part = cost(0, 12_000, 12_000, (1.2, 1.2), 0.03), cost(0, 12_000, 1024, (72.0, 6.1), 0.03)
    assert whole.text == "12,000 probe tokens at 3.0% mean one measurement in 40 s."
    assert part.text == (
        "12,000 probe tokens at 3.0% mean one measurement in 40 min; 1,024 are measured at first, one in 3.4 min."
    )
    assert (whole.suggestion, part.suggestion) == ("", "More are taken as the run gets longer.")
