"""Two processes that share a probe, played by two threads: sums and losses are those of one alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from audits import split_of
from peelwise.distributed.processes import ONE_PROCESS, Processes
from peelwise.engine.sweep import sweep
from peelwise.errors import OtherProcessError
from peelwise.model.architectures import find_blocks
from peelwise.model.runner import Runner
from zoo import ZOO, sample_ids

pytestmark = pytest.mark.filterwarnings("ignore::peelwise.errors.IllConditionedWarning")


class Threads(Processes):
    """One of two threads that meet at a barrier."""

    count = 2

    def __init__(self, rank, barrier, table):
        self.rank, self._barrier, self._table = rank, barrier, table

    def _exchanged(self, mine):
        self._table[self.rank] = mine
        self._barrier.wait(60)
        found = [self._table[0], self._table[1]]
        self._barrier.wait(60)
        return found

    def all_reduce_(self, totals):
        totals = list(totals)
        for total, others in zip(totals, zip(*self._exchanged([t.clone() for t in totals]), strict=True), strict=True):
            total.copy_(sum(others))

    def all_gather(self, rows):
        return torch.cat(self._exchanged(rows))

    def broadcast(self, value):
        return self._exchanged(value)[0]


def swept(model, split, processes):
    model.requires_grad_(False)
    runner = Runner(model, find_blocks(model), micro_batch_tokens=40, processes=processes)
    trace = runner.trace(split)
    (found,) = sweep(runner, trace, trace)
    return trace, runner.losses_from(trace, 1), found


@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_shares_are_equal_and_in_order(sequences):
    table, barrier = {}, None
    parts = [Threads(rank, barrier, table).part(sequences) for rank in (0, 1)]
    assert len(parts[0]) == len(parts[1])
    assert [place for part in parts for place in part if place is not None] == list(range(sequences))
    assert ONE_PROCESS.part(sequences) == list(range(sequences))


@pytest.mark.parametrize("name", ["plain", "llama"])
@pytest.mark.parametrize("lengths", [(13, 9, 13, 6, 11), (12,)], ids=["ragged", "fewer than processes"])
def test_what_two_find_is_what_one_finds(name, lengths):
    split = split_of([sample_ids(1, length, seed=length).flatten().tolist() for length in lengths])
    trace, losses, expected = swept(ZOO[name](), split, ONE_PROCESS)
    table, barrier, models = {}, threading.Barrier(2), (ZOO[name](), ZOO[name]())
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda rank: swept(models[rank], split, Threads(rank, barrier, table)), (0, 1)))
    for found_trace, found_losses, found in both:
        assert torch.equal(found_trace.tokens, trace.tokens)
        assert torch.allclose(found_trace.losses, trace.losses, rtol=1e-5)
        assert torch.allclose(found_losses, losses, rtol=1e-5)
        for block, proposals in expected.items():
            for number in ("energy", "natural_energy", "gradient_norm", "cross_energy"):
                assert found[block].signals[number] == pytest.approx(proposals.signals[number], rel=1e-3), number
    first, second = (
        {(b, d): [p.slope for p in maps.values()] for b, made in each.items() for d, maps in made.changes.items()}
        for _, _, each in both
    )
    assert first == second  # to the bit: what is tried next hangs on them


def test_the_reason_of_another_process():
    error = OtherProcessError(3, "ModelError: no", True)
    assert str(error) == "Process 3 failed: ModelError: no"
