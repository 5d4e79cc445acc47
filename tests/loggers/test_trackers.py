"""Other people's trackers hold what they were told: the real libraries, offline, read back from what they write."""

import json
import struct
import sys

import pytest

from loggers.test_loggers import ROWS, tell
from peelwise.errors import MissingExtraError
from peelwise.loggers.mlflow import MLflow
from peelwise.loggers.table import logger_of
from peelwise.loggers.trackio import Trackio
from peelwise.loggers.wandb import WeightsAndBiases
from runs import event, measurement_row

pytestmark = pytest.mark.slow

LOOK = measurement_row(1, kind="alone").scalars()
EXPECTED = [(0, {"peelwise/share": 0.0}), (1, {"peelwise/share": 0.02, "peelwise/loss": 3.5}), (1, LOOK)]


def test_what_is_expected_says_something():
    assert {"peelwise/probe_loss", "peelwise/recoverable/block_01", "peelwise/bound_upper/model"} <= LOOK.keys()


# -- Weights & Biases -------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    module = pytest.importorskip("wandb")
    yield module
    module.teardown()  # else the next run goes to this one's folder


def offline_records(folder):
    """Yield the records of an offline run: blocks of 32 KiB, each part with a checksum, its size and its kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # all of a record, or its last part
            yield Record.FromString(whole)
            whole = b""


def own(item):
    """Return what a history row holds, without the tracker's own columns."""
    values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in item}
    return {key: value for key, value in values.items() if not key.startswith("_")}


def test_weights_and_biases(wandb, tmp_path):
    logger = WeightsAndBiases(name="mine")
    tell(logger).close()
    assert wandb.run is None
    wandb.teardown()  # its other process has written everything then
    records = list(offline_records(tmp_path))
    rows = [own(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]
    shares = [{}, {}, {"peelwise/share": 0.029}]
    expected = zip(EXPECTED, shares, strict=True)
    assert rows == [{"peelwise/step": step, **values, **more} for (step, values), more in expected]
    assert {(r.metric.glob_name, r.metric.step_metric) for r in records} >= {("peelwise/*", "peelwise/step")}
    (run,) = {(r.run.project, r.run.display_name) for r in records if r.WhichOneof("record_type") == "run"}
    assert run == ("peelwise", "mine")
    alerts = [r.alert for r in records if r.WhichOneof("record_type") == "alert"]
    assert [(a.title, a.text, a.level) for a in alerts] == [
        ("peelwise: red", "step 1: block 0 is red Look.", "ERROR"),
        ("peelwise: red", "step 2: it is \ufffd[31mfrozen Look.", "ERROR"),
    ]


def test_weights_and_biases_in_a_run_that_goes_on(wandb, tmp_path):
    """The program's own steps are not moved: none of its rows is lost."""
    with wandb.init(project="theirs") as run:
        logger = WeightsAndBiases()
        for step in range(3):
            logger.step(ROWS[1][1])
            if step == 1:
                logger.measurement(ROWS[2][1])
            run.log({"theirs": step}, step=step)
        logger.event(event(3, level="info"))
        logger.close()
        run.log({"theirs": 3}, step=3)
    wandb.teardown()
    records = list(offline_records(tmp_path))
    rows = [own(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]
    assert [row["theirs"] for row in rows if "theirs" in row] == [0, 1, 2, 3]
    (look,) = [row for row in rows if "peelwise/step" in row]
    assert look == {"theirs": 0, "peelwise/step": 1, "peelwise/share": 0.029, **LOOK}


# -- MLflow -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlflow_db(tmp_path_factory):
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"  # making its tables takes seconds


@pytest.fixture
def mlflow(mlflow_db, tmp_path, monkeypatch):
    module = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    module.set_tracking_uri(f"sqlite:///{mlflow_db}")
    yield module
    module.set_tracking_uri("")


def logged(mlflow, run_id):
    client = mlflow.MlflowClient()
    keys = client.get_run(run_id).data.metrics
    return {key: [(m.step, m.value) for m in client.get_metric_history(run_id, key)] for key in keys}


def test_mlflow(mlflow):
    tell(logger_of("mlflow:mine", "a run")).close()
    (run,) = mlflow.search_runs(experiment_names=["mine"], output_format="list")
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a run")
    found = logged(mlflow, run.info.run_id)
    assert found == {key: [(1, value)] for key, value in LOOK.items()} | {
        "peelwise/share": [(0, 0.0), (1, 0.02)],
        "peelwise/loss": [(1, 3.5)],
    }
    text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/peelwise/events.txt")
    assert text.splitlines() == ["alert: step 1: block 0 is red Look.", "alert: step 2: it is \ufffd[31mfrozen Look."]


def test_mlflow_in_a_run_that_goes_on(mlflow):
    mlflow.set_experiment("theirs")
    with mlflow.start_run() as run:
        logger = MLflow()
        logger.step(ROWS[1][1])
        logger.close()
        assert mlflow.active_run() is not None
        assert logged(mlflow, run.info.run_id)["peelwise/loss"] == [(1, 3.5)]
    assert not mlflow.search_runs(experiment_names=["peelwise"], output_format="list")


# -- trackio ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads the folder when it is imported
    return pytest.importorskip("trackio")


def tracked(trackio, project, run):
    rows = trackio.SQLiteStorage.get_logs(project, run)
    return [(row["step"], {k: v for k, v in row.items() if k not in ("step", "timestamp")}) for row in rows]


def test_trackio(trackio):
    tell(Trackio("mine", "a-run")).close()
    assert tracked(trackio, "mine", "a-run") == EXPECTED
    alerts = trackio.SQLiteStorage.get_alerts("mine", "a-run")
    assert {(a["step"], a["level"], a["title"], a["text"]) for a in alerts} == {
        (1, "error", "peelwise: red", "step 1: block 0 is red Look."),
        (2, "error", "peelwise: red", "step 2: it is \ufffd[31mfrozen Look."),
    }


def test_trackio_in_a_run_that_goes_on(trackio):
    run = trackio.init("theirs", name="a-run", embed=False, auto_log_cpu=False)
    logger = Trackio()
    logger.step(ROWS[1][1])
    logger.close()
    run.log({"theirs": 1.0})
    trackio.finish()
    rows = [values for _, values in tracked(trackio, "theirs", "a-run")]
    assert rows == [{"peelwise/share": 0.02, "peelwise/loss": 3.5}, {"theirs": 1.0}]


# -- without them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_what_is_missing_is_said_with_its_remedy(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf'pip install "peelwise\[{name}\]"'):
        logger_of(name)
