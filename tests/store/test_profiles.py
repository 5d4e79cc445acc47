"""Profiles: what is packed is what is read, and what cannot be is left out."""

import math
import sqlite3

import numpy as np

from peelwise.records.run import WHOLE_MODEL, Measurement, Statistic
from peelwise.store import profiles
from peelwise.store.reader import RunReader
from peelwise.store.writer import RunWriter
from runs import run_info, write_run


def test_numbers_of_all_blocks_and_of_the_whole_model():
    rows = [Statistic("energy", 2, 1.5, to_median=-0.25), Statistic("energy", WHOLE_MODEL, 7.0)]
    rows += [Statistic("energy", 3, 9.0), Statistic("composed", WHOLE_MODEL, 1e300)]  # there is no block 3
    found = {(name, kind): np.frombuffer(text, "<f4") for name, kind, text in profiles.packed(rows, 3)}
    assert found.keys() == {("energy", "value"), ("energy", "to_median"), ("composed", "value")}
    np.testing.assert_array_equal(found["energy", "value"], [np.nan, np.nan, 1.5, 7.0])
    np.testing.assert_array_equal(found["energy", "to_median"], [np.nan, np.nan, -0.25, np.nan])
    assert found["composed", "value"][-1] == math.inf  # beyond what four bytes hold


def test_a_run_without_blocks_and_looks_without_numbers(tmp_path):
    with RunWriter(tmp_path / "run.db", run_info(blocks=())) as writer:
        writer.measurement(Measurement(0, "ranking", 2.0, 0.1, 0.0, ""))
        writer.measurement(
            Measurement(1, "ranking", 2.0, 0.1, 0.0, "", statistics=(Statistic("composed", WHOLE_MODEL, 1.0),))
        )
    with RunReader(tmp_path / "run.db") as reader:
        run = reader.latest()
        assert reader.values(run, "composed", WHOLE_MODEL).numbers.tolist() == [[1.0]]
        assert reader.to_median(run, "composed").numbers.shape == (0, 0)
        assert reader.values(run, "nothing", 0).probe_ids.tolist() == []


def test_only_the_steps_that_are_wanted_also_where_they_came_back(tmp_path):
    with RunWriter(tmp_path / "run.db", run_info()) as writer:
        for step in (0, 100, 2, 101):
            writer.measurement(
                Measurement(step, "ranking", 2.0, 0.1, 0.0, "RG?", statistics=(Statistic("energy", 1, step),))
            )
    with RunReader(tmp_path / "run.db") as reader:
        run = reader.latest()
        assert reader.values(run, "energy", 1).numbers[:, 0].tolist() == [0, 100, 2, 101]
        assert reader.values(run, "energy", 1, between=(50, 200)).numbers[:, 0].tolist() == [100, 101]


def test_runs_of_one_file_are_kept_apart(tmp_path):
    path = write_run(tmp_path / "run.db")
    write_run(path, steps=20, name="second")
    with RunReader(path) as reader:
        first, second = reader.runs()
        assert [len(reader.values(run, "energy", 0).probe_ids) for run in (first, second)] == [4, 2]


def test_a_damaged_row_is_left_out(tmp_path):
    path = write_run(tmp_path / "run.db")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE profiles SET numbers = x'00'")
    connection.close()
    with RunReader(path) as reader:
        run = reader.latest()
        assert len(reader.to_median(run, "energy").probe_ids) == 0
        assert len(reader.values(run, "energy", 0).probe_ids) == 0
