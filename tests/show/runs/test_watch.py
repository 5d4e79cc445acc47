"""The live view of a run history in the terminal."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from peelwise.records.run import RunInfo, StepRow
from peelwise.show.runs.watch import view, watch
from peelwise.store.reader import RunReader
from peelwise.store.writer import RunWriter
from runs import event, measurement_row, run_info, write_run


def drawn(path, width=140):
    console = Console(width=width, file=io.StringIO(), highlight=False)
    with RunReader(path) as reader:
        console.print(view(reader, reader.latest()))
    return console.file.getvalue()


@pytest.fixture
def run_db(tmp_path):
    return write_run(tmp_path / "run.db")


def test_what_is_shown(run_db):
    text = " ".join(drawn(run_db).split())
    assert text.startswith("run, run 1, finished | step 39, loss 3.6100 | monitor 3.0% of 3.0% asked for")
    assert "measured at step 30: 2.9700 on the probe" in text
    assert "loss -1 per 1,000 steps" in text
    assert "blocks.0 R red" in text
    assert "blocks.1 G green +0.0300 [0.0200, 0.0400] @30" in text  # measured then
    assert "Green does not mean undamaged" in text
    assert "30.1 (x1.5)" in text  # 1.5 times its running median
    assert "step 30: block 0 is red Look." in text


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"level": "alert", "kind": "labels-shifted", "block": None}, "Look here: the end is near"),
        ({"level": "alert", "kind": "red", "block": 0}, "Look here: the end is near"),  # its letter is R
        ({"level": "alert", "kind": "red", "block": 1}, "No alert so far."),  # it is green by now
        ({"level": "warning", "kind": "change", "block": 0}, "No alert so far."),
        ({"level": "warning", "kind": "unlike-scales", "block": 2}, "Look here: the end is near"),
        ({"level": "warning", "kind": "unlike-scales", "block": 1}, "No alert so far."),  # that block is decided
    ],
)
def test_what_to_look_at_first(told, words, tmp_path):
    path = tmp_path / "run.db"
    with RunWriter(path, run_info()) as writer:
        writer.measurement(replace(measurement_row(0), letters="RG?", events=()))
        writer.event(replace(event(3, text="the end is near"), **told))
        text = drawn(path)
    assert words in text
    assert ("Look here" in text) is words.startswith("Look here")


def test_before_the_first_look_and_with_hostile_names(tmp_path):
    path = tmp_path / "run.db"
    with RunWriter(path, run_info("[red]x[/red]", blocks=("[b]0[/b]", "\x1b[31m", "2"))) as writer:
        assert "[red]x[/red], run 1, running" in drawn(path)
        assert "No measurement yet" in drawn(path)
        writer.step(StepRow(0, None, 0.0))
        writer.measurement(measurement_row(0))
        assert "[b]0[/b]" in drawn(path)
        assert "\x1b" not in drawn(path)


def test_it_follows_until_the_run_ends(tmp_path):
    path, console = tmp_path / "run.db", Console(width=120, file=io.StringIO(), force_terminal=True)
    writer, slept = RunWriter(path, run_info()), []

    def sleep(seconds):
        slept.append(seconds)
        writer.step(StepRow(len(slept), 1.0, 0.0))
        if len(slept) == 3:
            writer.event(event(3, text="the end is near"))
            writer.close()

    with RunReader(path) as reader:
        watch(reader, None, console, seconds=0.5, sleep=sleep)
    assert slept == [0.5] * 3
    assert "step 2, loss 1.0000" in console.file.getvalue()
    assert "the end is near" in console.file.getvalue()


def test_command_line(run, run_db):
    code, printed, _ = run("watch", run_db, "--once")
    assert (code, "run 1, finished" in printed) == (0, True)
    code, _, error = run("watch", run_db, "--run", 4)
    assert (code, "has no run 4; it holds: 1" in error) == (2, True)


def test_sixty_blocks(tmp_path):
    path = tmp_path / "run.db"
    with RunWriter(path, RunInfo("big", "M", 1, tuple(f"layers.{i}" for i in range(60)))) as writer:
        writer.step(StepRow(0, 1.0, 0.0))
        writer.measurement(measurement_row(0, letters="RYG?" * 15))
    assert drawn(path).count("yellow") == 15
