"""The monitor beside a training loop: it changes nothing, keeps its share, outlives its file, tells what it sees."""

import contextlib
import copy
import logging
import os
import random
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import peelwise
from audits import part_of, tiny_probe
from damage import sign_flip
from peelwise.errors import OptionError, ProbeError, UnsupportedModelError
from peelwise.records.run import COLOURS
from peelwise.store.reader import RunReader
from peelwise.tasks.monitor import measure as measuring
from peelwise.tasks.monitor.follower import Follower, MonitorSettings
from zoo import BLOCKS, ZOO, sample_ids

STEPS, EVERY = 30, 5  # six visits and more: one of each kind


def model_of(name):
    """A tiny model in training mode, with dropout."""
    model = ZOO[name]().train()
    if name == "plain":
        for block in model.blocks:
            block.feed_forward.append(nn.Dropout(0.1))
    return model


def batch_of(step):
    # The user's data loading draws from the global generators, as it may.
    return sample_ids(2, 13, seed=step + int(np.random.randint(3)) + random.randrange(3))  # noqa: NPY002


def loss_of(model, ids):
    out = model(ids[:, :-1])
    return cross_entropy(getattr(out, "logits", out).flatten(0, 1).float(), ids[:, 1:].flatten())


def train(model, *, monitor=None, steps=STEPS, accumulate=1, autocast=False, inside=False, run=None):
    """Train and return everything that must not depend on whether somebody looked."""
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    run = model if run is None else run
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watching = monitor(run, optimizer) if monitor else None
    losses = []
    for step in range(steps):
        for part in range(accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_of(run, batch_of(step))
                if watching and inside:
                    watching.step(step, loss=loss)  # gradients half accumulated, within autocast
            (loss / accumulate).backward()
            losses.append(loss.item())
            if watching and inside and part == 0:
                watching.step(step, loss=loss)
        optimizer.step()
        if watching and not inside:
            watching.step(step, loss=loss)
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        optimizer.zero_grad()
    state = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
    return {
        "weights": [p.detach() for p in model.parameters()],
        "gradients": gradients,
        "optimizer": state,
        "losses": losses,
        "modes": [m.training for m in model.modules()],
        "grads": [p.requires_grad for p in model.parameters()],
        "random": (random.random(), float(np.random.rand()), float(torch.rand(1))),  # noqa: NPY002
    }, watching


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key in found:
        for a, b in zip(found[key], expected[key], strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, key


def scheduled(n=EVERY, **options):
    return lambda model, optimizer: peelwise.Monitor(
        model,
        tiny_probe(in_distribution=True),
        optimizer=optimizer,
        budget=None,
        schedule=peelwise.every(n),
        store=None,
        **options,
    )


# -- measuring never changes training ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {"steps": 200}),
        ("gpt2", {"accumulate": 2}),
        ("plain", {"accumulate": 2, "inside": True}),
        ("gpt2", {"autocast": True}),
        ("plain", {"autocast": True, "inside": True}),
    ],
)
def test_weights_are_the_same_to_the_bit_with_and_without(name, options):
    expected, _ = train(model_of(name), **options)
    steps = options.get("steps", STEPS)
    found, monitor = train(model_of(name), monitor=scheduled(steps // 6), **options)
    assert_same(found, expected)
    assert monitor.last.step >= 5 * (steps // 6)
    assert not [event for event in monitor.events if event.kind == "not-measured"]


@pytest.mark.parametrize("kind", ["transformers", "torch"])
def test_with_activation_checkpointing(kind):
    model = model_of("gpt2" if kind == "transformers" else "plain")
    expected, _ = train(copy.deepcopy(model))  # checkpointing changes nothing either
    if kind == "transformers":
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        for block in model.blocks:
            own = block.forward
            block.forward = lambda x, own=own: torch.utils.checkpoint.checkpoint(own, x, use_reentrant=False)
    found, monitor = train(model, monitor=scheduled())
    assert_same(found, expected)
    assert monitor.last is not None
    assert not [event for event in monitor.events if event.kind == "not-measured"]


@pytest.mark.parametrize("style", ["wrapped", "in place"])
def test_with_torch_compile_and_without_compiling_again(style):
    def build():
        torch._dynamo.reset()
        model = model_of("plain")
        if style == "in place":
            model.compile(backend="eager")
            return model, model
        return model, torch.compile(model, backend="eager")

    def watch(run, optimizer):
        # Compile first, then look: what is added to a compiled model afterwards is ignored by it.
        monitor = scheduled()(run, optimizer)
        monitor.step(0, loss=1.0)
        return monitor

    model, run = build()
    expected, _ = train(model, run=run)
    model, run = build()
    loss_of(run, sample_ids(2, 13)).backward()
    model.zero_grad()
    with torch.compiler.set_stance("fail_on_recompile"):
        found, monitor = train(model, run=run, monitor=watch)
    assert_same(found, expected)
    assert [block.name for block in monitor._follower.blocks] == [f"blocks.{i}" for i in range(BLOCKS)]
    assert not [event for event in monitor.events if event.kind == "not-measured"]


def test_a_monitor_that_is_not_careful_would_change_training(monkeypatch):
    """The control: without the guard, dropout and random numbers are not what they were."""
    expected, _ = train(model_of("plain"))

    @contextlib.contextmanager
    def careless(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        torch.rand(1)
        model.eval()
        yield
        model.train().requires_grad_(True)

    monkeypatch.setattr(measuring, "untouched", careless)
    found, _ = train(model_of("plain"), monitor=scheduled())
    with pytest.raises(AssertionError):
        assert_same(found, expected)


# -- what it sees --------------------------------------------------------------------------------------------------


def test_a_rolling_probe_changes_nothing_either():
    def rolling(model, optimizer):
        probe = peelwise.Probe.rolling(sample_ids(900, 9), tokens=6_000, each=400, in_distribution=True)
        return peelwise.Monitor(
            model, probe, optimizer=optimizer, budget=None, schedule=peelwise.every(EVERY), store=None
        )

    expected, _ = train(model_of("plain"))
    found, monitor = train(model_of("plain"), monitor=rolling)
    assert_same(found, expected)
    assert {s.name for s in monitor.last.statistics} >= {"recoverable_level", "recoverable"}
    assert not [event for event in monitor.events if event.kind == "not-measured"]


def test_a_visit_sees_what_an_audit_sees():
    model = ZOO["llama"]()
    with scheduled(1)(model, None) as monitor:
        kinds = [monitor.step(step, loss=3.0).kind for step in range(6)]
        rows = {}
        monitor.step(6)
        rows = {s.block: s for s in monitor.step(7).statistics if s.name == "recoverable"}
    assert kinds == ["ranking", "alone", "ranking", "joint", "ranking", "alone"]
    report = peelwise.audit(
        model, tiny_probe(in_distribution=True), peelwise.AuditSettings(joint_rounds=0, solo_rounds=1, controls=False)
    )
    found = {block: (row.value, row.low, row.high) for block, row in rows.items()}
    expected = {b.index: (i.mean, i.low, i.high) for b in report.record.blocks if (i := b.recoverable_nats)}
    # One block is searched as an audit does; the others begin at its step, in its direction, and may end elsewhere.
    assert any(found[block] == pytest.approx(expected[block], abs=2e-4) for block in found)
    assert all(found[block][1] < expected[block][2] and expected[block][1] < found[block][2] for block in found)


def test_history_of_a_run(tmp_path):
    path = tmp_path / "run.db"
    model = model_of("plain")
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if not n.startswith("blocks.1.")], lr=1e-3)
    heard = []
    options = {"budget": None, "schedule": peelwise.every(5), "store": path, "name": "mine"}
    with (
        peelwise.Monitor(model, tiny_probe(), optimizer=optimizer, on_event=heard.append, **options) as monitor,
        RunReader(path) as reader,
    ):
        for step in range(32):
            loss = loss_of(model, sample_ids(2, 13, seed=step))
            loss.backward()
            optimizer.step()
            monitor.step(step, loss=loss)
            optimizer.zero_grad()
            assert len(reader.steps(1)) == step + 1  # live
        run = reader.latest()
        assert (run.info.name, run.info.architecture, run.info.budget) == ("mine", "PlainGPT", None)
        assert run.info.probe["fingerprint"] == tiny_probe().fingerprint
        probes = reader.probes(1)
        assert [p["step"] for p in probes] == list(range(0, 32, 5))
        assert all(len(p["letters"]) == BLOCKS and set(p["letters"]) <= set(COLOURS) for p in probes)
        energies = reader.statistics(1, "energy", block=2)
        assert [row["to_median"] is None for row in energies] == [True] * 3 + [False] * 4
        assert len(reader.statistics(1, "unique")) == BLOCKS
        assert len(reader.statistics(1, "composed")) == len(reader.statistics(1, "bound_lower")) == 1
        upper = reader.statistics(1, "bound_upper")
        assert [row["step"] for row in upper] == [15, 20, 25, 30]  # measured in the joint look, then as last measured
        assert len({row["value"] for row in upper}) == 1
        assert {row["matrix"] for row in reader.matrices(1, 0)} == {
            "attention.qkv",
            "attention.out",
            "feed_forward.0",
            "feed_forward.2",
        }
        (missing,) = [event for event in reader.events(1) if event["kind"] == "not-optimised"]
        assert (missing["block"], missing["step"], missing["level"]) == (1, 0, "warning")
    assert [event.kind for event in monitor.events] == [event.kind for event in heard]
    with RunReader(path) as reader:
        assert reader.latest().status == "finished"


def test_losses_on_a_device_are_read_together_and_none_is_lost(tmp_path, monkeypatch):
    """A tensor that is not on the processor waits until something follows from it, or half a second."""
    from peelwise.tasks.monitor import follower

    monkeypatch.setattr("peelwise.api.monitor.read_later", lambda loss: True)
    monkeypatch.setattr(follower, "_READ_EVERY", 1e9)
    reads, read = [], follower.Follower._read
    monkeypatch.setattr(follower.Follower, "_read", lambda self: reads.append(len(self._unread)) or read(self))
    model, probe = ZOO["plain"]().train(), tiny_probe()
    losses = torch.linspace(4.0, 3.0, 40)
    with peelwise.Monitor(
        model, probe, store=tmp_path / "run.db", budget=None, schedule=peelwise.every(1000)
    ) as monitor:
        for step in range(1, 41):
            monitor.step(step, loss=losses[step - 1])
    assert sum(reads) == 40
    assert len(reads) < 15  # at steps that are looked at, and at the end
    with RunReader(tmp_path / "run.db") as reader:
        rows = reader.steps(1)
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert [row["loss"] for row in rows] == pytest.approx(losses.tolist())


def test_the_share_is_kept():
    """Not a timing: whatever things take, what is spent stays around the budget once it was spent at all."""
    model = model_of("plain")
    with peelwise.Monitor(model, tiny_probe(), budget=0.5, store=None) as monitor:
        visits = 0
        for step in range(100_000):
            loss_of(model, sample_ids(2, 13)).backward()
            visits += monitor.step(step, loss=1.0) is not None
            if visits == 4:
                break
        assert 0.2 < monitor.share < 0.8
        assert monitor.events[0].kind in ("cost", "few-tokens")


def test_alerts_reach_the_log(caplog):
    model = model_of("plain")
    model.blocks[0].requires_grad_(False)
    with caplog.at_level(logging.WARNING, "peelwise"), scheduled()(model, None) as monitor:
        monitor.step(0, loss=float("nan"))
        monitor.step(1, loss=float("inf"))
    assert sum("training loss is" in record.message for record in caplog.records) == 1
    assert sum("12 of 42 parameters are frozen" in record.message for record in caplog.records) == 1
    assert [event.kind for event in monitor.events if event.level == "alert"] == ["non-finite"]


def test_gradients_cleared_too_early_are_told_once():
    model = model_of("plain")
    with scheduled()(model, None) as monitor:
        for step in range(1, 5):
            monitor.step(step)
    assert [event.kind for event in monitor.events].count("no-gradients-seen") == 1


# -- trouble -------------------------------------------------------------------------------------------------------


def test_a_file_that_can_no_longer_be_written_ends_the_record_and_not_the_training(tmp_path, caplog):
    model, path = model_of("plain"), tmp_path / "run.db"
    options = {"budget": None, "schedule": peelwise.every(300)}
    with peelwise.Monitor(model, tiny_probe(), store=path, **options) as monitor:
        resource.prlimit(monitor._outlets.writer._keeper.pid, resource.RLIMIT_FSIZE, (300_000, 300_000))
        for step in range(1_000):
            monitor.step(step, loss=1.0)
        lost = [event for event in monitor.events if event.kind == "not-recorded"]
        assert len(lost) == 1
        assert "no longer recorded; training goes on" in lost[0].text
        assert monitor.last.step == 900  # it goes on looking
        assert not monitor.recorded
    assert sum("no longer recorded" in record.message for record in caplog.records) == 1
    with RunReader(path) as reader:
        written = [row["step"] for row in reader.steps(1)]
        assert written == list(range(len(written)))
        assert lost[0].step <= len(written) <= lost[0].step + 1


@pytest.mark.parametrize(
    "damage", ["removed", "overwritten", "truncated", "log truncated", "log overwritten", "shared memory truncated"]
)
def test_what_others_do_to_the_file_is_said_once_and_training_goes_on(damage, tmp_path):
    path = tmp_path / "run.db"
    with peelwise.Monitor(
        model_of("plain"), tiny_probe(), store=path, budget=None, schedule=peelwise.every(50)
    ) as monitor:
        monitor.step(np.int64(0), loss=np.float32(1.0))
        assert monitor.recorded
        time.sleep(0.02)  # the clock of files has ticked
        if damage == "removed":
            path.unlink()
        else:
            what, how = damage.rsplit(" ", 1) if " " in damage else ("file", damage)
            hurt = Path(str(path) + {"file": "", "log": "-wal", "shared memory": "-shm"}[what])
            if how == "truncated":
                os.truncate(hurt, 0)
            else:  # in place: nothing of the file was copied out of the log yet
                with hurt.open("r+b") as file:
                    file.write(os.urandom(hurt.stat().st_size))
        for step in range(1, 5):
            monitor.step(step, loss=1.0)
        assert not monitor.recorded
        (lost,) = [event for event in monitor.events if event.kind == "not-recorded"]
        assert (lost.step, "no longer recorded; training goes on" in lost.text) == (1, True)


@pytest.mark.parametrize("store", ["", ":memory:", "run\0.db"])
def test_a_store_that_names_no_file_is_said(store):
    with peelwise.Monitor(model_of("plain"), tiny_probe(), store=store) as monitor:
        assert not monitor.recorded
        assert "takes the name of a file" in monitor.events[0].text


def newer_file(path):
    peelwise.Monitor(model_of("plain"), tiny_probe(), store=path).close()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize(
    ("spoil", "store", "words"),
    [
        (None, "/proc/run.db", "cannot be written"),
        (None, "missing/run.db", "there is no folder"),
        (lambda path: path.write_text("no database"), "run.db", "no SQLite file"),
        (newer_file, "run.db", "has schema 99"),
    ],
    ids=["read-only", "no folder", "foreign", "newer"],
)
def test_without_a_file_to_write_to_training_goes_on_and_that_is_said_once(spoil, store, words, tmp_path, caplog):
    path, told = tmp_path / store, []
    if spoil is not None:
        spoil(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    options = {"budget": None, "schedule": peelwise.every(3), "on_event": told.append}
    with peelwise.Monitor(model_of("plain"), tiny_probe(), store=path, **options) as monitor:
        for step in range(7):
            monitor.step(step, loss=1.0)
        assert not monitor.recorded
        assert monitor.last.step == 6  # it looks all the same
        (lost,) = [event for event in monitor.events if event.kind == "not-recorded"]
    assert told[0] == lost
    assert "is not recorded; training goes on" in lost.text
    assert words in lost.text
    assert sum("is not recorded" in record.message for record in caplog.records) == 1
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_second_monitor_on_the_same_file_trains_on_unrecorded(tmp_path):
    options = {"budget": None, "schedule": peelwise.every(1)}
    first = peelwise.Monitor(model_of("plain"), tiny_probe(), store=tmp_path / "run.db", **options)
    with first, peelwise.Monitor(model_of("plain"), tiny_probe(), store=tmp_path / "run.db", **options) as second:
        assert (first.recorded, second.recorded) == (True, False)
        assert "one writer at a time" in second.events[0].text
        assert second.step(0, loss=1.0) is not None
        first.step(0, loss=1.0)
    with RunReader(tmp_path / "run.db") as reader:
        assert len(reader.runs()) == len(reader.probes(1)) == 1
    with peelwise.Monitor(model_of("plain"), tiny_probe(), store=tmp_path / "run.db") as third:
        assert third.recorded


def test_a_model_that_breaks_does_not_end_the_training():
    model = model_of("plain")
    with scheduled(1)(model, None) as monitor:
        with torch.no_grad():
            model.blocks[1].attention.out.weight.fill_(torch.nan)
        assert monitor.step(0, loss=1.0) is None
        assert monitor.step(1, loss=1.0) is None
        assert [e.kind for e in monitor.events].count("not-measured") == 1
        assert "is nan" in next(e for e in monitor.events if e.kind == "not-measured").text
        model.load_state_dict(model_of("plain").state_dict())
        assert monitor.step(2, loss=1.0) is not None  # it looks again
        model.blocks[2].forward = lambda x: 1 / 0
        assert monitor.step(3, loss=1.0) is None
        assert monitor.step(4, loss=1.0) is None
    (broken,) = [e for e in monitor.events if "ZeroDivisionError" in e.text]
    assert "tried again later" in broken.text
    assert model.training


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0.0}, "share of wall time above 0"),
        ({"budget": 3}, "up to 1, got 3"),
        ({"budget": None}, "a schedule must say when"),
    ],
)
def test_refusals(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=words):
        peelwise.Monitor(model_of("plain"), tiny_probe(), **options)
    assert list(tmp_path.iterdir()) == []


def test_models_and_probes_that_do_not_fit_are_refused_at_once():
    with pytest.raises(UnsupportedModelError, match="No blocks found"):
        peelwise.Monitor(nn.Linear(2, 2), tiny_probe(), store=None)
    probe = peelwise.Probe.from_tokens(sample_ids(28, 10) + 50)
    with pytest.raises(ProbeError, match="Token ids must lie in"):
        peelwise.Monitor(model_of("plain"), probe, store=None)


TRAININGS = """
import os, sys
sys.path[:0] = {paths!r}
import torch, torch._dynamo, peelwise  # optimisers import the second at their first step: here it is done once for all
from audits import part_of, tiny_probe
from kills import killed_children
from peelwise.store.reader import RunReader
from api.test_monitor import loss_of, model_of
from zoo import sample_ids
path, kills = {path!r}, {kills}

def train(name, tell):
    torch.set_num_threads(1)
    model = model_of("plain")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = peelwise.every(2)
    probe = part_of(tiny_probe(), fit=8, select=2, report=4)
    monitor = peelwise.Monitor(model, probe, budget=None, schedule=schedule, store=path, name=name)
    for step in range(10**6):
        loss = loss_of(model, sample_ids(2, 13, seed=step))
        loss.backward()
        optimizer.step()
        monitor.step(step, loss=loss)
        optimizer.zero_grad()
        os.write(tell, b".")

# Forked before this process has computed anything, so that the children may. From before there is a model to the
# middle of its looks.
for kill, done in killed_children(train, kills, wanted=[0, 1, 2, 4], seconds=lambda draw: draw.random() * 0.2):
    if not os.path.exists(path):
        continue
    with RunReader(path) as reader:
        runs = [run for run in reader.runs() if run.info.name == kill]
        if not runs:
            assert done == 0, "the run itself is lost"
            continue
        steps = [row["step"] for row in reader.steps(runs[0].id)]
        probes = [row["step"] for row in reader.probes(runs[0].id)]
        assert done <= len(steps) <= done + 1, (done, steps)
        assert steps == list(range(len(steps)))
        assert (done + 1) // 2 <= len(probes) <= (done + 2) // 2, (done, probes)
        assert probes == list(range(0, 2 * len(probes), 2))
        print(len(steps))
"""


def check_killed_trainings(folder, kills):
    """Kill so many training processes, one after another; also called with dozens, nightly."""
    path = folder / "run.db"
    code = TRAININGS.format(paths=[p for p in sys.path if p], path=str(path), kills=kills)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sum(map(int, done.stdout.split())) >= kills  # the control: there was something to lose
    with peelwise.Monitor(model_of("plain"), tiny_probe(), store=path), RunReader(path) as reader:
        *killed, last = [run.status for run in reader.runs()]
        assert (set(killed), last) == ({"interrupted"}, "running")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.nightly
def test_killing_a_training_process_at_random_moments_loses_at_most_a_record(tmp_path):
    check_killed_trainings(tmp_path, 3)


def raising(*_):
    raise ZeroDivisionError("mine")


def test_nothing_that_is_given_to_it_raises_into_the_training():
    class Bad:
        step = measurement = event = lambda self, row: None
        close = raising

    with scheduled(1, on_event=raising, on_measurement=raising, loggers=[Bad()])(model_of("plain"), None) as monitor:
        for step in (torch.tensor(0), np.int64(1), 2**63, "x", torch.zeros(3)):
            assert monitor.step(step, loss=torch.ones(2)) is not None
    kinds = [event.kind for event in monitor.events]
    assert kinds.count("not-called") == 2
    assert kinds.count("not-followed") == 2  # the loss and the step, each once
    assert monitor.last.step == 4  # counted on
    assert monitor.step(5) is None  # closed


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.linalg.LinAlgError, RuntimeError])
def test_after_an_error_that_nobody_foresaw_it_measures_again_later_and_smaller(error, monkeypatch):
    with scheduled(1)(model_of("plain"), None) as monitor:
        before, measure = monitor._follower._tokens, measuring.measure
        seen = []

        def scarce(*args, micro_batch_tokens, **options):
            seen.append(micro_batch_tokens)
            if micro_batch_tokens > before // 4:
                raise error
            return measure(*args, micro_batch_tokens=micro_batch_tokens, **options)

        monkeypatch.setattr("peelwise.tasks.monitor.follower.measure", scarce)
        found = [monitor.step(step, loss=1.0) is not None for step in range(6)]
    assert found == [False] * 5 + [True]  # one left out, then two
    assert seen == [before, before // 2, before // 4]


def test_threads_take_turns_and_a_forked_child_ends_nothing(tmp_path):
    monitor = peelwise.Monitor(
        model_of("plain"), tiny_probe(), budget=None, schedule=peelwise.every(1), store=tmp_path / "run.db"
    )
    threads = [threading.Thread(target=lambda: [monitor.step(s, loss=1.0) for s in range(3)]) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not [event for event in monitor.events if event.kind in ("not-measured", "not-followed")]
    child = os.fork()
    if not child:
        monitor.step(9)
        monitor.close()
        os._exit(0)
    os.waitpid(child, 0)
    with RunReader(tmp_path / "run.db") as reader:
        assert (reader.latest().status, len(reader.probes(1))) == ("running", 6)
    monitor.close()
    with RunReader(tmp_path / "run.db") as reader:
        assert reader.latest().status == "finished"  # the control: its maker can


@pytest.mark.parametrize("who", ["on_event", "on_measurement", "logger"])
def test_other_peoples_code_may_block_without_holding_up_other_threads(who):
    entered, leave, seen = threading.Event(), threading.Event(), []

    def blocking(row):
        seen.append(row.step)
        entered.set()
        assert leave.wait(60)

    class Slow:
        measurement = staticmethod(blocking)
        step = event = lambda self, row: None
        close = lambda self: None  # noqa: E731

    options = {"loggers": [Slow()]} if who == "logger" else {who: blocking}
    monitor = scheduled(1, **options)(model_of("plain"), None)
    first = threading.Thread(target=monitor.step, args=(0,), kwargs={"loss": float("nan")})
    first.start()
    assert entered.wait(60)
    second = threading.Thread(target=monitor.step, args=(1,), kwargs={"loss": 1.0})
    second.start()
    second.join(60)
    assert not second.is_alive()
    assert first.is_alive()  # the control: it does block
    assert monitor.last.step == 1
    leave.set()
    first.join(60)
    assert sorted(seen) == seen  # in order, and nothing is lost
    assert seen[-1] == 1 or who == "on_event"
    monitor.close()


IMPORTED = """
import sys
sys.path[:0] = {path!r}
import peelwise
from audits import tiny_probe
from zoo import ZOO

model, probe = ZOO["plain"](), tiny_probe()
assert "scipy.special" not in sys.modules
monitor = peelwise.Monitor(model, probe, store=None)
assert "scipy.special" in sys.modules
"""


def test_no_step_waits_for_an_import_and_none_can_be_interrupted_in_it():
    code = IMPORTED.format(path=[path for path in sys.path if path])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Rows:
    """A recorder that keeps what it is told."""

    def __init__(self):
        self.rows = []

    def step(self, row): ...

    def measurement(self, row):
        self.rows.append(row)

    def event(self, event): ...


def test_a_damaged_block_turns_red_when_the_loss_stands_still_and_a_healthy_model_does_not(
    small_gpt, training_probe, monkeypatch
):
    """Both kinds of faults at once: what the block could gain, and that nothing trains it."""
    monkeypatch.setattr(measuring, "_affordable", lambda session, order, *_: list(order))  # busy or not
    probe = part_of(training_probe, fit=16, select=5, report=10)
    settings = MonitorSettings(budget=None, schedule=lambda step: step == 40, plan=("alone",))
    noise, letters = np.random.default_rng(0).normal(scale=0.05, size=41), {}
    for name in ("damaged", "healthy"):
        model, _ = small_gpt("final")
        model = sign_flip(model, 3) if name == "damaged" else model
        kept = Rows()
        follower = Follower(model, probe, settings, kept)
        model.model.layers[3].requires_grad_(False)  # while it trains: not by design
        for step in range(41):
            follower.step(step, loss=3.0 + noise[step])
        (row,) = kept.rows
        letters[name] = row.letters
        if name == "damaged":
            (others,) = [event for event in row.events if event.block is None]  # its neighbours can make up for it
            assert "which has a common cause as a rule" in others.text
        if name == "damaged":
            (own,) = [event for event in row.events if event.block == 3]
            assert own.suggestion == "It has frozen parameters; check whether that is meant."
    assert letters["damaged"][3] == "R"
    assert "R" not in letters["healthy"]
