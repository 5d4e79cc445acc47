"""What the page is given: thinned, whole, and nothing lost that matters."""

import math
import random
from dataclasses import replace

import pytest

pytest.importorskip("uvicorn", reason="the live page needs starlette and uvicorn")

from peelwise.run_records import WHOLE_MODEL, ProbeRow, Statistic, StepRow
from peelwise.show.dashboard import queries
from peelwise.store.reader import RunReader
from peelwise.store.writer import RunWriter
from peelwise.verdict import cloud_colour
from runs import event, probe_row, run_info, write_run

RANK = {letter: rank for rank, letter in enumerate("G?YR")}


def slow_worst(letters, stride):
    groups = [letters[i : i + stride] for i in range(0, len(letters), stride)]
    return ["".join(max(column, key=RANK.__getitem__) for column in zip(*group, strict=True)) for group in groups]


@pytest.mark.parametrize("stride", [1, 2, 7, 100])
def test_worst_letters_like_the_slow_way(stride):
    draw = random.Random(stride)
    letters = ["".join(draw.choice("RYG?") for _ in range(5)) for _ in range(93)]
    assert queries.worst(letters, stride) == slow_worst(letters, stride)


@pytest.fixture
def thinned(monkeypatch):
    monkeypatch.setattr(queries, "COLUMNS", 10)
    monkeypatch.setattr(queries, "LOSS_BINS", 20)


@pytest.fixture
def long_run(tmp_path):
    """95 steps with a probe each; one spike of the loss, one red moment, one outlier of a statistic each way."""
    path = tmp_path / "run.db"
    with RunWriter(path, run_info()) as writer:
        for step in range(95):
            writer.step(StepRow(step, 50.0 if step == 44 else 2.0, 0.03))
            to_median = {33: 9.0, 71: 0.05}.get(step, 1.1)
            rows = [Statistic("energy", b, 1.0, to_median=to_median if b == 1 else 1.0) for b in range(3)]
            letters = "GRG" if step == 60 else "G?Y"
            writer.probe(ProbeRow(step, "ranking", 2.0, 0.1, 0.03, letters, statistics=tuple(rows)))
    return path


def test_thinning_hides_no_spike_and_no_red(long_run, thinned):
    with RunReader(long_run) as reader:
        found = queries.overview(reader, reader.latest())
        heat = queries.heat(reader, reader.latest(), "energy")
    loss, looks = found["loss"], found["looks"]
    assert len(loss["first"]) == 19
    assert loss["stride"] == 5
    assert max(loss["high"]) == 50.0
    assert loss["mean"][8] == pytest.approx((4 * 2.0 + 50.0) / 5)
    assert sum(loss["rows"]) == 95
    assert (loss["first"][1], loss["last"][1]) == (5, 9)
    assert looks["stride"] == 10
    assert looks["letters"] == ["G?Y"] * 6 + ["GRY"] + ["G?Y"] * 3
    assert (looks["first"][-1], looks["last"][-1], looks["rows"][-1]) == (90, 94, 5)
    cells = {(place, block): value for place, block, value in heat["cells"]}
    assert cells[3, 1] == 9.0
    assert cells[7, 1] == 0.05
    assert cells[0, 1] == 1.1
    assert heat["first"] == looks["first"]


def test_a_choice_of_steps_is_shown_finer(long_run, thinned):
    with RunReader(long_run) as reader:
        run = reader.latest()
        found = queries.overview(reader, run, (55, 64))
        assert found["looks"]["letters"] == ["G?Y"] * 5 + ["GRG"] + ["G?Y"] * 4
        assert found["loss"]["first"] == list(range(55, 65))
        assert found["now"]["step"][0] == 94  # where the run stands does not depend on what is looked at
        heat = queries.heat(reader, run, "energy", (30, 39))
        assert [value for place, block, value in heat["cells"] if block == 1][3] == 9.0
        block = queries.block(reader, run, 1, (30, 32))
        assert [row[0] for row in block["series"]["energy"]] == [30, 31, 32]
        assert queries.overview(reader, run, (1000, 2000))["looks"]["letters"] == []


def test_the_cloud_and_statistics_nobody_told_the_page_of(tmp_path):
    path = tmp_path / "run.db"
    with RunWriter(path, run_info()) as writer:
        for step in range(4):
            rows = [Statistic("codes_flipped", b, 0.1 * b, to_median=1.0) for b in range(3)]
            rows += [Statistic("drift", 0, 1.0, low=0.5, high=1.5), Statistic("overlap", WHOLE_MODEL, 0.5)]
            if step % 2:
                rows += [Statistic("bound_upper", WHOLE_MODEL, 3.0 + step), Statistic("bound_lower", WHOLE_MODEL, 2.0)]
            writer.probe(ProbeRow(step, "ranking", 2.5, 0.1, 0.03, "RG?", statistics=tuple(rows)))
    with RunReader(path) as reader:
        run = reader.latest()
        found = queries.overview(reader, run)
        assert found["bounds"] == {"upper": [[1, 4.0], [3, 6.0]], "lower": [[1, 2.0125], [3, 2.0125]]}
        facts = {each["name"]: each for each in found["statistics"]}
        assert facts["codes_flipped"]["title"] == "Codes flipped"
        assert facts["codes_flipped"]["quotient"]
        assert not facts["drift"]["quotient"]  # what has an interval is compared by differences
        assert not facts["bound_upper"]["of_blocks"]
        assert len(queries.block(reader, run, 2)["series"]["codes_flipped"]) == 4
        assert set(queries.block(reader, run, WHOLE_MODEL)["series"]) == {"bound_lower", "bound_upper", "overlap"}
        assert found["latest"][0][:3] == ["codes_flipped", 3, 0]


@pytest.mark.parametrize("margin", [None, 0.1])
def test_the_edges_of_the_cloud_are_where_its_colour_changes(tmp_path, margin):
    path = tmp_path / "run.db"
    RunWriter(path, replace(run_info(), settings={"margin": margin})).close()
    with RunReader(path) as reader:
        run = reader.latest()
    draw = random.Random(0)
    for _ in range(200):
        upper, lower = draw.uniform(2, 4), draw.uniform(2, 4)
        edges = queries.cloud_edges(run, 3.0, {"bound_upper": upper, "bound_lower": lower})
        for loss in (draw.uniform(1.5, 4.5), edges["lower"] - 1e-9, edges["lower"] + 1e-9, upper + 1e-9):
            ours = "red" if loss > edges["upper"] else "green" if loss <= edges["lower"] else "yellow"
            assert ours == cloud_colour(loss, upper, lower, 0.015 if margin is None else margin)
    assert queries.cloud_edges(run, 3.0, {}) == {}


def test_one_block(tmp_path):
    path = write_run(tmp_path / "run.db")
    with RunReader(path) as reader:
        found = queries.block(reader, reader.latest(), 1)
    assert [row[0] for row in found["series"]["energy"]] == [0, 10, 20, 30]
    assert found["series"]["recoverable"][-1] == [30, 1, 0.03, 0.02, 0.04, None]
    assert [each["name"] for each in found["matrices"]] == ["attention.out", "feed_forward.0"]
    assert found["matrices"][0]["share"] == found["matrices"][0]["median"] == 0.7
    assert found["verdicts"] == []


def test_empty_and_undefined(tmp_path):
    path = tmp_path / "run.db"
    with RunWriter(path, run_info(name="\u202eabc\x1b")) as writer:
        with RunReader(path) as reader:
            found = queries.overview(reader, reader.latest())
        assert found["now"] == {"step": None, "look": None}
        assert found["cursor"] == [0, 0, 0]
        writer.step(StepRow(0, None, 0.0))
        writer.event(event(0, text="a\u202eb"))
        rows = (Statistic("energy", 0, math.inf, to_median=math.inf),)
        writer.probe(ProbeRow(0, "ranking", 2.0, 0.1, 0.0, "RG?", statistics=rows))
    with RunReader(path) as reader:
        found = queries.overview(reader, reader.latest())
        assert found["loss"]["mean"] == [None]
        assert queries.heat(reader, reader.latest(), "energy")["cells"] == []
        assert queries.block(reader, reader.latest(), 0)["series"]["energy"] == [[0, 0, None, None, None, None]]
        assert found["events"][0]["text"] == "a\ufffdb"
        assert queries.run_facts(reader.latest(), "0.1", "f")["name"] == "\ufffdabc\ufffd"
    assert probe_row(0).letters == "RG?"
