"""The live stream: whole records, each once, also after a broken connection."""

import http.client

import pytest

pytest.importorskip("uvicorn", reason="the live page needs starlette and uvicorn")

from peelwise.records.run import StepRow
from peelwise.show.dashboard import news
from peelwise.show.dashboard.news import Place, parse_places
from peelwise.store.reader import RunReader
from peelwise.store.writer import RunWriter
from runs import event, measurement_row, run_info, write_run
from show.dashboard.asking import served

pytestmark = pytest.mark.slow


def told(path, place):
    with RunReader(path) as reader:
        return news.since(reader, reader.run(int(place.run.split(".")[1])), place)


def test_places_are_read_back_and_nothing_else_is():
    places = [Place("0.1", 12, 3, 4), Place("3.17", 0, 0, 0)]
    assert parse_places(",".join(map(str, places))) == places
    for wrong in (
        "",
        "0.1",
        "0.1@1.2",
        "0.1@1.2.3,",
        "a.1@1.2.3",
        "0.1@-1.2.3",
        "0.1@1.2.3;DROP",
        "0.1@1.2.3\n",
        "../0.1@1.2.3",
    ):
        assert parse_places(wrong) is None


def test_a_probe_is_one_message_with_everything(tmp_path):
    path = tmp_path / "run.db"
    with RunWriter(path, run_info()) as writer:
        writer.step(StepRow(7, 2.5, 0.01))
        writer.measurement(measurement_row(7, kind="alone", events=(event(7),)))
    steps, probe, events = told(path, Place("0.1"))
    assert (steps.kind, steps.content["rows"][0][:3]) == ("steps", [7, 2.5, 0.01])
    assert (probe.kind, probe.content["look"]["letters"]) == ("probe", "RG?")
    assert len(probe.content["statistics"]) == len(measurement_row(7, kind="alone").statistics)
    assert ["recoverable", 7, 1, 0.03, 0.02, 0.04, None] in probe.content["statistics"]
    assert probe.content["matrices"] == [[1, "attention.out", 0.7], [1, "feed_forward.0", 0.3]]
    assert probe.content["verdicts"][0]["colour"] == "red"
    assert (events.kind, events.content["rows"][0]["text"]) == ("events", "block 0 is red")
    assert told(path, events.behind) == []


def test_wherever_it_breaks_off_every_record_comes_once(tmp_path):
    path = write_run(tmp_path / "run.db")
    whole = told(path, Place("0.1"))
    assert [message.kind for message in whole] == ["steps", *["probe"] * 4, "events"]
    for count, message in enumerate(whole, start=1):
        assert told(path, message.behind) == whole[count:]


def test_who_is_far_behind_loads_again(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run.db")
    monkeypatch.setattr(news, "MOST_PROBES", 3)
    assert [message.kind for message in told(path, Place("0.1"))] == ["reload"]
    assert [message.kind for message in told(path, Place("0.1", 40, 2, 1))] == ["probe", "probe"]


def test_the_stream_goes_on_where_it_was(tmp_path):
    path = tmp_path / "run.db"
    with RunWriter(path, run_info()) as writer, served(path) as ask:
        writer.step(StepRow(0, 3.0, 0.0))
        (_, kind, listed), (place, _, first) = ask.messages("0.1@0.0.0", 2)[::-1]
        assert (kind, first["rows"][0][0]) == ("runs", 0)
        assert listed["files"][0]["runs"][0]["status"] == "running"
        for step in range(1, 4):  # while nobody listens
            writer.step(StepRow(step, 3.0, 0.0))
        writer.measurement(measurement_row(3))
        found = ask.messages("0.1@0.0.0", 3, last=place)  # as a browser does by itself
        assert [kind for _, kind, _ in found] == ["steps", "probe", "runs"]
        assert [row[0] for row in found[0][2]["rows"]] == [1, 2, 3]
        writer.close()
        (_, kind, listed) = ask.messages(found[1][0], 1)[0]
        assert listed["files"][0]["runs"][0]["status"] == "finished"


def test_several_runs_in_one_stream(tmp_path):
    one, other = write_run(tmp_path / "one.db"), write_run(tmp_path / "other.db", steps=20)
    write_run(one, steps=10, name="again")
    with served(one, other) as ask:
        runs = [run["key"] for file in ask("/api/runs").content["files"] for run in file["runs"]]
        assert runs == ["0.1", "0.2", "1.1"]
        found = ask.messages("0.2@0.0.0,1.1@0.0.0", 7)
        assert {content.get("run") for _, kind, content in found if kind != "runs"} == {"0.2", "1.1"}
        behind = found[-2][0]
        assert [place.run for place in parse_places(behind)] == ["0.2", "1.1"]


def test_a_file_that_goes_away_is_said(tmp_path):
    path = write_run(tmp_path / "run.db")
    with served(path) as ask:
        path.rename(tmp_path / "elsewhere.db")
        file = ask("/api/runs").content["files"][0]
        assert "No run history" in file["error"]
        assert ask("/api/overview?run=0.1").status == 404


def test_too_many_pages(tmp_path, monkeypatch):
    from peelwise.show.dashboard import app

    monkeypatch.setattr(app, "MOST_STREAMS", 1)
    with served(write_run(tmp_path / "run.db")) as ask:
        first = ask.connected("/api/stream?from=0.1@0.0.0")
        stream = first.getresponse()
        stream.readline()
        assert ask("/api/stream?from=0.1@0.0.0").status == 503
        assert isinstance(stream, http.client.HTTPResponse)
