"""Live loggers hold what they were told, as it is told."""

import io
import json
from dataclasses import asdict

import pytest
import torch

import peelwise
from audits import tiny_probe
from peelwise.errors import OptionError, OutputError
from peelwise.loggers.console import Console
from peelwise.loggers.jsonl import JsonLines
from peelwise.loggers.table import LOGGERS, logger_of
from peelwise.loggers.tensorboard import TensorBoard
from peelwise.records.run import StepRow
from runs import event, measurement_row
from zoo import ZOO

ROWS = [
    ("step", StepRow(0, None, 0.0)),
    ("step", StepRow(1, 3.5, 0.02)),
    ("measurement", measurement_row(1, kind="alone", events=(event(1),))),
    ("event", event(2, text="it is \x1b[31mfrozen")),
]


def tell(logger):
    for kind, row in ROWS:
        getattr(logger, kind)(row)
    return logger


def test_console():
    stream = io.StringIO()
    tell(Console(stream)).close()
    first, *events = stream.getvalue().splitlines()
    assert first.startswith(
        "step 1: 2.9990 nats on the probe, blocks RG? (1 red, 0 yellow, 1 green, 1 grey), alone in 0.5 s"
    )
    assert events[0] == "alert: step 1: block 0 is red Look."
    assert "\x1b" not in events[1]


def test_json_lines_are_whole_at_once(tmp_path):
    path = tmp_path / "run.jsonl"
    logger = tell(JsonLines(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    logger.close()
    named = {"measurement": "probe"}  # the file keeps the word that files people have use
    assert lines == [json.loads(json.dumps({"row": named.get(kind, kind), **asdict(row)})) for kind, row in ROWS]
    tell(JsonLines(path)).close()
    assert len(path.read_text().splitlines()) == 2 * len(ROWS)  # a run that goes on is appended
    with pytest.raises(OutputError, match="cannot be written"):
        JsonLines(tmp_path / "none" / "run.jsonl")


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell(TensorBoard(tmp_path)).close()
    events = EventAccumulator(str(tmp_path)).Reload()
    found = {tag: [(e.step, round(e.value, 5)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    expected = {
        tag: [(1, pytest.approx(value, abs=1e-5))] for tag, value in measurement_row(1, kind="alone").scalars().items()
    }
    assert found == expected | {"peelwise/loss": [(1, 3.5)], "peelwise/share": [(0, 0.0), (1, 0.02)]}
    texts = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors("peelwise/events")]
    assert texts[0] == (1, "step 1: block 0 is red Look.")
    assert all(abs(e.wall_time - events.FirstEventTimestamp()) < 60 for e in events.Scalars("peelwise/loss"))


@pytest.mark.parametrize("what", ["comet:x", "jsonl", "tensorboard:", ""])
def test_unknown_loggers(what):
    known = r"console, jsonl:FILE, tensorboard:FOLDER, wandb\[:PROJECT\], mlflow\[:EXPERIMENT\], trackio\[:PROJECT\]"
    with pytest.raises(OptionError, match=f"A logger is one of {known}; got"):
        logger_of(what)


def test_a_monitor_tells_its_loggers_and_outlives_them(tmp_path, capsys):
    pytest.importorskip("tensorboard")

    class Broken(JsonLines):
        def measurement(self, row):
            raise OSError("no space left")

    broken = Broken(tmp_path / "broken.jsonl")
    loggers = ["console", f"jsonl:{tmp_path / 'run.jsonl'}", f"tensorboard:{tmp_path / 'board'}", broken]
    model = ZOO["plain"]()
    options = {"budget": None, "schedule": peelwise.every(2), "store": None}
    with peelwise.Monitor(model, tiny_probe(), loggers=loggers, **options) as monitor:
        for step in range(4):
            monitor.step(step, loss=torch.tensor(3.0))
    kinds = [json.loads(line)["row"] for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert (kinds.count("step"), kinds.count("probe")) == (4, 2)
    assert "step 2: " in capsys.readouterr().err
    assert list((tmp_path / "board").iterdir())
    lost = [e.text for e in monitor.events if e.kind == "not-recorded"]
    assert lost == ["Broken logs nothing more; training goes on. no space left"]
    assert {"console", "jsonl", "tensorboard"} < set(LOGGERS)
