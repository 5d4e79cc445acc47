"""How processes share rows, sequences and pieces of work, each of them played in turn."""

import pytest

from peelwise.distributed.processes import ONE_PROCESS, Processes
from peelwise.distributed.shared import Shared
from peelwise.errors import OtherProcessError


class OneOf(Processes):
    """One of several, with what the others say once all have spoken."""

    def __init__(self, rank, count, said):
        self.rank, self.count, self._said = rank, count, said

    def exchange(self, value):
        self._said[self.rank] = value
        return [self._said.get(rank, {}) for rank in range(self.count)]


def everyone(count):
    return [OneOf(rank, count, {}) for rank in range(count)]


@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_sequences_are_shared_equally_and_in_order(sequences):
    parts = [each.part(sequences) for each in everyone(2)]
    assert len(parts[0]) == len(parts[1])
    assert [place for part in parts for place in part if place is not None] == list(range(sequences))
    assert ONE_PROCESS.part(sequences) == list(range(sequences))


@pytest.mark.parametrize("rows", [0, 1, 7, 12])
def test_rows_are_shared_without_gap_or_overlap(rows):
    taken = [list(range(rows))[each.rows(rows)] for each in everyone(3)]
    assert [row for part in taken for row in part] == list(range(rows))
    assert max(map(len, taken)) - min(map(len, taken)) <= 1


COSTS = [64.0, 1.0, 1.0, 9.0, 64.0, 1.0, 1.0, 9.0]


def test_pieces_are_done_once_by_whom_has_least_to_do_and_known_to_all_in_order():
    said, done = {}, [[] for _ in range(2)]
    for _ in range(2):  # the second time round the others have spoken
        for pieces in done:
            pieces.clear()
        results = []
        for rank, pieces in enumerate(done):
            shared = Shared(OneOf(rank, 2, said))
            for place, cost in enumerate(COSTS):
                shared.ask(cost, lambda place=place, pieces=pieces: pieces.append(place) or f"result {place}")
            try:
                results.append(shared.results())
            except KeyError:  # the other has not spoken yet
                results.append(None)
    assert results == [[f"result {place}" for place in range(len(COSTS))]] * 2
    assert sorted(done[0] + done[1]) == list(range(len(COSTS)))
    loads = [sum(COSTS[place] for place in pieces) for pieces in done]
    assert max(loads) / sum(loads) < 0.52


def test_one_process_does_all_in_order_and_starts_anew_after_each_time():
    shared, done = Shared(ONE_PROCESS), []
    for piece in "abc":
        shared.ask(1.0, lambda piece=piece: done.append(piece) or piece.upper())
    assert shared.results() == ["A", "B", "C"]
    assert done == ["a", "b", "c"]
    assert shared.results() == []


def test_the_reason_of_another_process():
    error = OtherProcessError(3, "ModelError: no", True)
    assert str(error) == "Process 3 failed: ModelError: no"
