"""What the server does where many ask, where nobody says anything, and where nothing is new."""

import contextlib
import os
import socket
import sqlite3
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("uvicorn", reason="the live page needs starlette and uvicorn")

from peelwise.records.run import StepRow
from peelwise.show.dashboard import app, connections, news, queries, watched
from peelwise.show.dashboard.serve import Address, serve
from peelwise.show.dashboard.watched import Histories
from peelwise.store.reader import RunReader
from peelwise.store.writer import RunWriter
from runs import run_info, write_run
from show.dashboard.asking import served

pytestmark = pytest.mark.slow

STREAM = "/api/stream?from=0.1@40.4.1"


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("load") / "run.db")


# -- many connections ----------------------------------------------------------------------------------------------


def test_a_burst_of_pages_does_not_pass_the_limit(history, monkeypatch):
    monkeypatch.setattr(app, "MOST_STREAMS", 4)
    with served(history) as ask, contextlib.ExitStack() as stack:
        asked = [stack.enter_context(contextlib.closing(ask.connected(STREAM))) for _ in range(30)]
        assert sorted(each.getresponse().status for each in asked) == [200] * 4 + [503] * 26
    with served(history) as ask:  # who leaves makes room, and so does who was refused for another reason
        for _ in range(6):
            assert ask("/api/stream?from=0.9@0.0.0").status == 404
            connection = ask.connected(STREAM)
            answer = connection.getresponse()
            assert answer.status == 200
            answer.close()
            connection.close()
            time.sleep(0.8)


def half_open(port):
    attempt = socket.create_connection(("127.0.0.1", port))
    attempt.sendall(b"GET / HTTP/1.1\r\nHost: ")
    return contextlib.closing(attempt)


def test_half_open_requests_shut_nobody_out(history, monkeypatch):
    monkeypatch.setattr(connections, "most_connections", lambda: 20)
    with served(history, token=True) as ask, contextlib.ExitStack() as stack:
        cookie = ask(f"/?token={ask.token}").headers["Set-Cookie"].split(";")[0]
        stream = ask.connected(STREAM, ("Cookie", cookie)).getresponse()
        assert stream.readline() == b"retry: 1000\n"
        for _ in range(150):
            stack.enter_context(half_open(ask.port))
        assert ask("/api/runs", ("Cookie", cookie)).status == 200
        write_run(history.with_name("other.db"), steps=1)
        assert stream.readline() == b"\n"  # it is still there
        assert stream.readline().startswith(b"event: runs")


def test_who_says_nothing_is_sent_away(history, monkeypatch):
    monkeypatch.setattr(connections, "SECONDS_TO_ASK", 0.3)
    with served(history) as ask, half_open(ask.port) as silent:
        silent.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert silent.recv(1) == b""
        assert ask("/api/runs").status == 200


def test_few_descriptors_leave_room_for_the_rest(monkeypatch):
    resource = pytest.importorskip("resource")
    for soft, most in ((1024, 256), (128, 32), (20, 8), (resource.RLIM_INFINITY, 256)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert connections.most_connections() == most


# -- strange requests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", ["a[b]=1", "{}=x", 'a="b', "x", "=", "a=1;;", "é=ü", "@=1; b,c=2", "peelwise=1"])
def test_cookies_of_other_pages_are_no_hindrance(history, others):
    with served(history, token=True) as ask:
        cookie = ask(f"/?token={ask.token}").headers["Set-Cookie"].split(";")[0]
        for line in (f"{others}; {cookie}", f"{cookie}; {others}"):
            assert ask("/api/runs", ("Cookie", line)).status == 200
        assert ask("/api/runs", ("Cookie", others)).status == 403


@pytest.mark.parametrize("origin", ["http://[::1", "http://[", "http://a]b", "//", "http://\xbd", "\x00", ""])
def test_a_malformed_origin_is_refused_without_a_traceback(history, origin):
    with served(history) as ask:
        assert ask("/api/runs", ("Origin", origin)).status in (400, 403)


def test_the_token_is_not_in_the_command_line_of_the_browser(history):
    opened, said, done = [], [], threading.Event()

    def look(url):
        file = Path(unquote(urlsplit(url).path))
        opened.append((url, file.read_text(), file.stat().st_mode & 0o777, file.parent.stat().st_mode))
        done.set()

    address = Address(port=0, token=True)
    threading.Thread(
        target=lambda: serve([history], address, browser=True, say=said.append, open_browser=look), daemon=True
    ).start()
    assert done.wait(20)
    token = said[0].partition("token=")[2]
    (found,) = opened
    assert len(token) >= 32
    assert found[0].startswith("file:///")
    assert token not in found[0]
    assert f"?token={token}" in found[1]
    assert (found[2], found[3] & 0o777) == (0o600, 0o700)


# -- damage --------------------------------------------------------------------------------------------------------


def test_a_damaged_file_leaves_the_page_of_the_others_alone(history, tmp_path):
    bad = write_run(tmp_path / "bad.db")
    with served(bad, history) as ask:
        with contextlib.closing(sqlite3.connect(bad)) as connection, connection:
            connection.execute("UPDATE runs SET probe = '[1'")
            connection.execute("UPDATE steps SET step = x'0300000000000000'")
        damaged, whole = ask("/api/runs").content["files"]
        assert "damaged" in damaged["error"]
        assert [run["key"] for run in whole["runs"]] == ["1.1"]
        assert ask("/api/overview?run=1.1").status == 200
        answer = ask("/api/overview?run=0.1")
        assert answer.status in (404, 500)
        assert b"is damaged" in answer.body
        (_, kind, content) = ask.messages("1.1@0.0.0", 1)[0]
        assert (kind, content["run"]) == ("steps", "1.1")


# -- nothing new ---------------------------------------------------------------------------------------------------


def test_files_that_do_not_change_are_not_read_again(history, monkeypatch):
    past = time.time() - 60
    os.utime(history, (past, past))
    files, opened = Histories([history, history.with_name("none.db")], seconds=0.0), []
    monkeypatch.setattr(watched, "RunReader", lambda path: opened.append(path) or RunReader(path))
    first = files.marks()
    assert [len(file["runs"]) for file in files.listing()["files"]] == [1, 0]
    for _ in range(50):
        assert files.listing()["files"][0]["runs"]
        assert files.shared(0, "question", lambda: opened.append("asked") or 7) == 7
    assert files.marks() == first
    assert opened.count(history) == opened.count("asked") == 1
    os.utime(history, (past + 1, past + 1))
    assert files.marks()[0] != first[0]
    assert files.shared(0, "question", lambda: 8) == 8


def test_what_just_changed_is_looked_at_again(history):
    """Two changes within one tick of the clock bear the same time."""
    os.utime(history)
    files = Histories([history], seconds=0.0)
    assert files.marks() != files.marks()


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    path = write_run(tmp_path_factory.mktemp("long") / "run.db")
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        steps = "INSERT INTO steps (run_id, step, time, loss, share) VALUES (1, ?, 0.5, 2.0, 0.03)"
        connection.executemany(steps, ((step,) for step in range(40, 100_040)))
        columns = "run_id, step, time, level, kind, text, suggestion"
        events = f"INSERT INTO events ({columns}) VALUES (1, ?, 0.5, 'info', 'x', '', '')"
        connection.executemany(events, ((step,) for step in range(50_000)))
    write_run(path, steps=5, name="second")
    return path


def work_of(reader, ask):
    """Return the answer and how many hundreds of SQLite's instructions it took."""
    count = [0]

    def tick():
        count[0] += 1

    reader._connection.set_progress_handler(tick, 100)
    return ask(), count[0]


def test_news_cost_what_is_new_and_not_what_there_is(long_run):
    with RunReader(long_run) as reader:
        first, second = reader.runs()
        assert reader.newest_ids(1) == (100_040, 4, 50_001)
        assert reader.newest_ids(2) == (100_045, 5, 50_002)
        assert reader.newest_ids(3) == (0, 0, 0)
        for run, place in (
            (first, news.Place("0.1", 100_040, 4, 50_001)),
            (second, news.Place("0.2", 100_045, 5, 50_002)),
        ):
            found, work = work_of(reader, lambda run=run, place=place: news.since(reader, run, place))
            assert (found, work < 50) == ([], True)
        found, work = work_of(reader, lambda: news.since(reader, first, news.Place("0.1", 100_030, 4, 49_990)))
        assert [(m.kind, len(m.content["rows"])) for m in found] == [("steps", 10), ("events", 11)]
        assert work < 50
        found, work = work_of(reader, lambda: news.since(reader, second, news.Place("0.2")))
        assert [m.kind for m in found] == ["steps", "probe", "events"] or [m.kind for m in found] == ["reload"]
        shown = queries.overview(reader, first)
        assert len(shown["events"]) == queries.EVENTS
        assert shown["cursor"] == [100_040, 4, 50_001]
        assert shown["now"]["step"][0] == 100_039


def test_a_run_without_rows_has_no_newest(tmp_path):
    with RunWriter(tmp_path / "run.db", run_info()) as writer, RunReader(tmp_path / "run.db") as reader:
        assert reader.newest_ids(1) == (0, 0, 0)
        writer.step(StepRow(7, 1.0, 0.0))
        assert reader.newest_ids(1) == (1, 0, 0)
