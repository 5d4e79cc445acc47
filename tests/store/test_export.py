"""Exports of a run history hold what the history holds."""

import csv
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from peelwise.errors import OptionError
from peelwise.store.export import FORMATS, MANIFEST, export, scalars
from peelwise.store.reader import RunReader
from peelwise.store.schema import TABLES
from peelwise.store.writer import RunWriter
from runs import event, measurement_row, run_info, write_run

pytestmark = pytest.mark.slow

LIBRARIES = {"parquet": "pyarrow", "tensorboard": "tensorboard"}


@pytest.fixture(scope="module")
def run_db(tmp_path_factory):
    path = tmp_path_factory.mktemp("history") / "run.db"
    write_run(path, steps=40)
    return write_run(path, steps=20, name="second")


@pytest.fixture
def exported(run_db, tmp_path):
    def write(form):
        with RunReader(run_db) as reader:
            export(reader, reader.runs(), form, tmp_path)
        return tmp_path

    return write


def rows_of(run_db, table, runs=(1, 2)):
    with RunReader(run_db) as reader:
        return [dict(row) for run_id in runs for row in reader.table(table, run_id)]


def test_csv(exported, run_db):
    folder = exported("csv")
    for table in TABLES:
        with (folder / f"{table}.csv").open(newline="") as file:
            found = list(csv.DictReader(file))
        expected = [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows_of(run_db, table)]
        assert found == expected


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\n", " =", "＝"])
def test_text_is_no_formula_in_a_spreadsheet(first, tmp_path):
    evil = f"{first}HYPERLINK(1)"
    path = tmp_path / "run.db"
    row = replace(measurement_row(-3, events=(event(-3, text=evil, suggestion=evil),)), verdicts=(), slope=-1e-3)
    with RunWriter(path, replace(run_info(evil), blocks=(evil, "plain", "a=b"))) as writer:
        writer.measurement(row)
    with RunReader(path) as reader:
        for form in ("csv", "jsonl"):
            export(reader, reader.runs(), form, tmp_path)
    cells = {}
    for file in tmp_path.glob("*.csv"):
        with file.open(newline="", encoding="utf-8") as text:
            cells[file.stem] = list(csv.DictReader(text))
    marked = f"'{evil}"
    assert cells["runs"][0]["name"] == cells["events"][0]["text"] == cells["events"][0]["suggestion"] == marked
    assert [each["name"] for each in cells["blocks"]] == [marked, "plain", "a=b"]
    assert (cells["probes"][0]["step"], cells["probes"][0]["slope"]) == ("-3", "-0.001")  # numbers stay numbers
    assert json.loads((tmp_path / "runs.jsonl").read_text())["name"] == evil


def test_json_lines(exported, run_db):
    folder = exported("jsonl")
    for table in TABLES:
        found = [json.loads(line) for line in (folder / f"{table}.jsonl").read_text().splitlines()]
        assert found == rows_of(run_db, table)


def test_parquet(exported, run_db):
    parquet = pytest.importorskip("pyarrow.parquet")

    folder = exported("parquet")
    for table in TABLES:
        assert parquet.read_table(folder / f"{table}.parquet").to_pylist() == rows_of(run_db, table)


def test_tensorboard(exported, run_db):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = exported("tensorboard")
    with RunReader(run_db) as reader:
        for run_ in reader.runs():
            events = EventAccumulator(str(folder / f"run-{run_.id}"), size_guidance={"scalars": 0}).Reload()
            found = {
                (tag, event.step, event.wall_time, round(event.value, 5))
                for tag in events.Tags()["scalars"]
                for event in events.Scalars(tag)
            }
            assert found == {(tag, step, time, round(value, 5)) for time, step, tag, value in scalars(reader, run_)}
            assert {tag for tag, *_ in found} >= {"peelwise/loss", "peelwise/energy/block_02", "peelwise/probe_loss"}


def test_an_unknown_format_is_named(exported):
    with pytest.raises(OptionError, match="csv, jsonl, parquet, tensorboard; got 'xlsx'"):
        exported("xlsx")


@pytest.mark.parametrize("form", FORMATS)
def test_command_line(form, run, run_db, tmp_path):
    pytest.importorskip(LIBRARIES.get(form, "json"))
    out = tmp_path / "exported"
    code, printed, _ = run("export", run_db, "--to", form, "--out", out)
    assert (code, json.loads((out / MANIFEST).read_text())["runs"]) == (0, [1, 2])
    assert "wrote" in printed
    code, _, error = run("export", run_db, "--to", form, "--out", out)
    assert (code, "--force" in error) == (2, True)
    code, _, _ = run("export", run_db, "--to", form, "--out", out, "--force", "--run", 2)
    assert (code, json.loads((out / MANIFEST).read_text())["runs"]) == (0, [2])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.db", "--to", "csv"], "No run history at none.db"),
        (["DB", "--to", "xlsx"], "'xlsx' is not one of 'csv'"),
        (["DB", "--to", "csv", "--run", "7"], "no run 7; it holds: 1, 2"),
    ],
)
def test_command_line_refusals_leave_nothing(arguments, words, run, run_db, tmp_path):
    arguments = [str(run_db) if argument == "DB" else argument for argument in arguments]
    code, _, error = run("export", *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert words in " ".join(error.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("form", "missing"), LIBRARIES.items())
def test_without_the_library_the_error_says_what_to_install(form, missing, run_db, tmp_path):
    code = f"import sys; sys.modules |= dict.fromkeys(({missing!r}, 'torch')); import peelwise.cli.main as m; m.main()"
    command = [sys.executable, "-c", code, "export", str(run_db), "--to", form, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, f'pip install "peelwise[{form}]"' in done.stderr) == (2, True), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_export_needs_no_torch(run_db, tmp_path):
    code = f"""if True:
        import sys
        sys.modules["torch"] = None
        from pathlib import Path
        from peelwise.store.export import FORMATS, export
        from peelwise.store.reader import RunReader
        for form in FORMATS:
            folder = Path({str(tmp_path)!r}) / form
            folder.mkdir()
            with RunReader({str(run_db)!r}) as reader:
                export(reader, reader.runs(), form, folder)
    """
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {folder.name for folder in tmp_path.iterdir()} == set(FORMATS)
