"""What the page is given: thinned, whole, and nothing lost that matters."""

import math
import random
import sqlite3
from dataclasses import replace
from itertools import pairwise

import pytest

pytest.importorskip("uvicorn", reason="the live page needs starlette and uvicorn")

from peelwise.evidence.verdict import cloud_colour
from peelwise.records.run import WHOLE_MODEL, Measurement, Statistic, StepRow
from peelwise.show.dashboard import queries
from peelwise.store import profiles
from peelwise.store.reader import RunReader
from peelwise.store.writer import RunWriter
from runs import event, measurement_row, run_info, write_run

RANK = {letter: rank for rank, letter in enumerate("FG?YR")}


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
            writer.measurement(Measurement(step, "ranking", 2.0, 0.1, 0.03, letters, statistics=tuple(rows)))
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
    values = heat["values"]
    assert (values[3][1], values[7][1], values[0][1]) == (9.0, 0.05, 1.1)
    assert heat["first"] == looks["first"]


def test_a_choice_of_steps_is_shown_finer(long_run, thinned):
    with RunReader(long_run) as reader:
        run = reader.latest()
        found = queries.overview(reader, run, (55, 64))
        assert found["looks"]["letters"] == ["G?Y"] * 5 + ["GRG"] + ["G?Y"] * 4
        assert found["loss"]["first"] == list(range(55, 65))
        assert found["now"]["step"][0] == 94  # where the run stands does not depend on what is looked at
        heat = queries.heat(reader, run, "energy", (30, 39))
        assert heat["values"][3][1] == 9.0
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
            writer.measurement(Measurement(step, "ranking", 2.5, 0.1, 0.03, "RG?", statistics=tuple(rows)))
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


def noisy_run(path, looks, *, red_at, spike_at):
    """Every block's statistic is noise; block 2 is red in one look alone, and block 1 swells and shrinks in one."""
    draw = random.Random(looks)
    parts = []

    def insert(table, **values):
        names, places = ", ".join(values), ", ".join("?" * len(values))
        parts.append((f"INSERT INTO {table} ({names}) VALUES ({places})", [tuple(values.values())]))

    with RunWriter(path, run_info()) as writer:
        for step in range(looks):
            letters = "GGR" if step == red_at else "GGG"
            probe_id = step + 1
            insert(
                "probes", run_id=1, step=step, time=0, kind="ranking", probe_loss=2, seconds=1, share=0, letters=letters
            )
            numbers = [draw.lognormvariate(0, 0.3) for _ in range(3)]
            if step in spike_at:
                numbers[1] = spike_at[step]
            rows = [Statistic("energy", b, 5 * number, to_median=number) for b, number in enumerate(numbers)]
            for s in rows:
                insert(
                    "statistics", probe_id=probe_id, name=s.name, block=s.block, value=s.value, to_median=s.to_median
                )
            for name, kind, packed in profiles.packed(rows, 3):
                insert("profiles", name=name, kind=kind, probe_id=probe_id, numbers=packed)
        writer._keeper.write(parts, 60)  # one transaction for all is quicker
    return path


def plain(path, column):
    """``column`` of the energies, ``[looks][blocks]``, by the plainest SQL."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute(f"SELECT {column} FROM statistics WHERE name = 'energy' ORDER BY probe_id, block")
        found = [value for (value,) in rows]
    return [found[i : i + 3] for i in range(0, len(found), 3)]


@pytest.mark.slow
def test_one_look_among_ten_thousand_can_be_seen(tmp_path):
    path = noisy_run(tmp_path / "run.db", 10_000, red_at=7_654, spike_at={1_234: 300.0, 8_765: 1e-4})
    with RunReader(path) as reader:
        run = reader.latest()
        looks = queries.overview(reader, run)["looks"]
        heat = queries.heat(reader, run, "energy")
        series = queries.block(reader, run, 1)["series"]["energy"]
    (red,) = [place for place, letters in enumerate(looks["letters"]) if "R" in letters]
    assert looks["letters"][red] == "GGR"
    assert looks["first"][red] <= 7_654 <= looks["last"][red]
    assert len(looks["letters"]) == len(heat["values"]) <= 1_200
    values = [row[1] for row in heat["values"]]
    assert (max(values), min(values)) == (300.0, 1e-4)
    for step, value in ((1_234, 300.0), (8_765, 1e-4)):
        assert values[next(i for i, last in enumerate(heat["last"]) if step <= last)] == value
    assert len(series) <= 400
    assert series[-1][0] == 9_999  # the newest look is always there
    assert max(row[7] for row in series) == 1500.0
    assert min(row[6] for row in series) == pytest.approx(5e-4)
    # Every column is the one farthest from the median, and every place the whole range, of plain SQL's numbers.
    to_median, value = plain(path, "to_median"), plain(path, "value")
    for first, last, row in list(zip(heat["first"], heat["last"], heat["values"], strict=True))[::50]:
        slow = [
            max(column, key=lambda v: abs(math.log(v))) for column in zip(*to_median[first : last + 1], strict=True)
        ]
        assert row == pytest.approx(slow, rel=6e-3)  # three digits
    for before, row in list(pairwise(series))[::20]:
        shared = [value[step][1] for step in range(before[0] + 1, row[0] + 1)]
        assert row[2] == shared[-1]
        assert row[6:] == pytest.approx([min(shared), max(shared)], rel=1e-6)


def test_what_is_not_thinned_is_what_plain_sql_says(tmp_path):
    path = noisy_run(tmp_path / "run.db", 300, red_at=7, spike_at={})
    with RunReader(path) as reader:
        run = reader.latest()
        heat = queries.heat(reader, run, "energy")
        series = queries.block(reader, run, 2)["series"]["energy"]
        some = queries.heat(reader, run, "energy", (100, 109))
    to_median, value = plain(path, "to_median"), plain(path, "value")
    assert heat["first"] == heat["last"] == list(range(300))
    for row, slow in zip(heat["values"], to_median, strict=True):
        assert row == [float(f"{number:.3g}") for number in slow]
    assert [row[:3] for row in series] == [[step, 2, row[2]] for step, row in enumerate(value)]
    assert {len(row) for row in series} == {6}  # no range: nothing shares a place
    assert some["values"] == heat["values"][100:110]


def test_a_file_of_schema_1_shows_the_same(tmp_path):
    path = noisy_run(tmp_path / "run.db", 2_500, red_at=7, spike_at={77: 20.0})

    def asked():
        with RunReader(path) as reader:
            run = reader.latest()
            return [
                queries.overview(reader, run),
                queries.heat(reader, run, "energy", (5, 2_000)),
                *(queries.block(reader, run, block) for block in (1, 2, WHOLE_MODEL, 99)),
            ]

    new = asked()
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE profiles")
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    before = path.read_bytes()
    assert same(asked(), new)
    assert path.read_bytes() == before
    RunWriter(path, run_info("again")).close()  # brings the file up to date; the run before has no profiles
    with RunReader(path) as reader:
        assert same(queries.heat(reader, reader.run(1), "energy", (5, 2_000)), new[1])
        assert queries.heat(reader, reader.run(2), "energy")["values"] == []


def same(one, other):
    """Whether contents are alike, numbers to six digits: those of profiles have seven."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == (pytest.approx(other, rel=1e-6) if isinstance(other, float) else other)


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
        writer.measurement(Measurement(0, "ranking", 2.0, 0.1, 0.0, "RG?", statistics=rows))
    with RunReader(path) as reader:
        found = queries.overview(reader, reader.latest())
        assert found["loss"]["mean"] == [None]
        assert queries.heat(reader, reader.latest(), "energy")["values"] == [[None] * 3]
        assert queries.block(reader, reader.latest(), 0)["series"]["energy"] == [[0, 0, None, None, None, None]]
        assert found["events"][0]["text"] == "a\ufffdb"
        assert queries.run_facts(reader.latest(), "0.1", "f")["name"] == "\ufffdabc\ufffd"
    assert measurement_row(0).letters == "RG?"
