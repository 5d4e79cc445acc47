"""Attacks on the page, tried against the real server."""

import re
import socket
import sys
import threading

import pytest

pytest.importorskip("uvicorn", reason="the live page needs starlette and uvicorn")

from peelwise.show.dashboard.app import static_files
from peelwise.show.dashboard.guard import HEADERS
from peelwise.store.reader import RunReader
from runs import write_run
from show.dashboard.asking import served

pytestmark = pytest.mark.slow

ADDRESSES = (
    "/",
    "/static/app.js",
    "/api/runs",
    "/api/overview?run=0.1",
    "/api/heat?run=0.1&statistic=energy",
    "/api/block?run=0.1&block=1",
    "/api/stream?from=0.1@0.0.0",
)
WHOLE = [address for address in ADDRESSES if "stream" not in address]  # whose answers end


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("guard") / "run.db")


@pytest.fixture(scope="module")
def ask(history):
    with served(history) as asker:
        yield asker


@pytest.fixture(scope="module")
def ask_with_token(history):
    with served(history, token=True) as asker:
        yield asker


# -- who can reach it --------------------------------------------------------------------------------------------


def test_it_listens_on_this_machine_only(ask):
    assert ask.server._socket.getsockname()[0] == "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.connect(("192.0.2.1", 9))  # sends nothing; tells our own address in the network
        own = other.getsockname()[0]
    if own.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    with socket.socket() as attempt, pytest.raises(ConnectionRefusedError):
        attempt.connect((own, ask.port))


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8717",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "10.0.0.7",
        "169.254.169.254",
        "user@evil.example",
        "[::1",
        None,
    ],
)
def test_a_rebound_name_is_refused(ask, address, host):
    assert ask(address, host=host).status in (400, 421)


def test_two_hosts_are_refused(ask):
    assert ask("/api/runs", ("Host", "evil.example")).status in (400, 421)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9000", "127.0.0.1:1", "[::1]:8717"])
def test_our_names_are_answered_through_a_tunnel_too(ask, host):
    assert ask("/api/runs", host=host).status == 200


# -- other sites -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("origin", ["https://evil.example", "http://127.0.0.1:1", "http://localhost", "null", "[::1"])
def test_another_origin_is_refused(ask, address, origin):
    answer = ask(address, ("Origin", origin))
    assert answer.status == 403
    assert b"PlainGPT" not in answer.body


def test_the_own_origin_is_answered(ask):
    assert ask("/api/runs", ("Origin", f"http://127.0.0.1:{ask.port}")).status == 200


@pytest.mark.parametrize("address", ADDRESSES[1:])
@pytest.mark.parametrize("site", ["cross-site", "same-site"])  # another port of this machine is the same site
def test_other_sites_cannot_load_anything(ask, address, site):
    assert ask(address, ("Sec-Fetch-Site", site), ("Sec-Fetch-Mode", "no-cors")).status == 403
    navigation = ("Sec-Fetch-Site", site), ("Sec-Fetch-Mode", "navigate"), ("Sec-Fetch-Dest", "document")
    assert ask(address, *navigation).status == 403


def test_other_sites_can_link_to_the_page_but_not_frame_it(ask):
    come = ("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", "navigate")
    assert ask("/", *come, ("Sec-Fetch-Dest", "document")).status == 200
    assert ask("/", *come, ("Sec-Fetch-Dest", "iframe")).status == 403
    assert "frame-ancestors 'none'" in ask("/").headers["Content-Security-Policy"]


# -- it only reads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"])
@pytest.mark.parametrize("address", ADDRESSES)
def test_no_method_writes(ask, address, method):
    assert ask(address, method=method).status == 405


def test_the_history_is_never_written(ask, history):
    before = history.read_bytes()
    for address in WHOLE:
        assert ask(address).status == 200
    with RunReader(history) as reader:
        assert reader._connection.execute("PRAGMA query_only").fetchone() is not None
        for attack in (
            "DELETE FROM runs",
            "UPDATE runs SET name = ''",
            "CREATE TABLE mine (x)",
            "PRAGMA user_version = 9",
        ):
            with pytest.raises(Exception, match="readonly"):
                reader._connection.execute(attack)
    assert history.read_bytes() == before


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("run=0.1&statistic=energy';DROP TABLE runs;--", 200),
        ("run=0.1&statistic=energy%27%20OR%201=1--", 200),
        ("run=0.1;DROP TABLE runs&statistic=energy", 404),
    ],
)
def test_sql_in_the_address_is_only_text(ask, query, status):
    answer = ask(f"/api/heat?{query.replace(' ', '%20')}")
    assert answer.status == status
    assert status == 404 or answer.content["values"] == [[]] * 4  # four looks, and nothing of such a name in them
    assert all(ask("/api/heat?run=0.1&statistic=energy").content["values"])  # the control
    assert ask("/api/runs").content["files"][0]["runs"]


# -- no path from the address is opened --------------------------------------------------------------------------

PATHS = (
    "/etc/passwd",
    "/static/../../../../etc/passwd",
    "/static/..%2f..%2f..%2fetc%2fpasswd",
    "/static/%2e%2e/%2e%2e/app.py",
    "/static//etc/passwd",
    "/static/..%5c..%5capp.py",
    "/static/app.py",
    "/static/app.js%00.css",
    "/static/",
    "//etc/passwd",
    "/api/overview?run=/etc/passwd",
    "/api/overview?run=../run.db",
    "/api/overview?run=1.1",
    "/api/overview?run=-1.1",
    "/api/overview?run=0.99",
    "/api/overview?file=/etc/passwd",
    "/api/overview?run=0.1%00",
    "/api/stream?from=/etc/passwd",
    "/api/stream?from=/etc/passwd@1.1.1",
    "/api/block?run=0.1&block=../../etc/passwd",
)


@pytest.mark.parametrize("address", PATHS)
def test_no_path_leads_anywhere(ask, address):
    answer = ask(address)
    assert answer.status in (400, 404)
    assert b"root:" not in answer.body


def test_only_the_named_history_is_ever_opened(ask, history):
    """The interpreter itself tells of every file that is opened while the attacks go on."""
    static_files()  # read once, at the beginning
    opened, ours, watching = set(), threading.current_thread(), True

    def watch(event, arguments):
        if watching and event in ("open", "sqlite3.connect") and threading.current_thread() is not ours:
            opened.add(str(arguments[0]))

    sys.addaudithook(watch)
    try:
        for address in (*PATHS, *WHOLE):
            ask(address)
    finally:
        watching = False
    sources = re.compile(r"(\.py|\.pyc|\.zip|/)$")  # a module that is imported late
    assert {name for name in opened if not sources.search(name)} == {f"{history.absolute().as_uri()}?mode=ro"}


# -- the token ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ADDRESSES)
def test_without_the_token_nothing_is_answered(ask_with_token, address):
    assert ask_with_token(address).status == 403
    wrong = ("Cookie", f"peelwise-{ask_with_token.port}=guess")
    assert ask_with_token(address, wrong).status == 403
    mixed = ("Cookie", f"peelwise-{ask_with_token.port}={ask_with_token.token}")
    assert ask_with_token(address, mixed).status == 403  # the token is no session


def test_a_wrong_token_is_refused(ask_with_token):
    for guess in ("", "guess", ask_with_token.token[:-1], ask_with_token.token + "x", "%00", "é".encode().hex()):
        answer = ask_with_token(f"/?token={guess}")
        assert (answer.status, answer.headers["Set-Cookie"]) == (403, None)


def test_the_token_counts_for_the_page_only(ask_with_token):
    assert ask_with_token(f"/api/runs?token={ask_with_token.token}").status == 403
    assert ask_with_token("/api/runs", ("Authorization", f"Bearer {ask_with_token.token}")).status == 403


def test_the_token_once_then_a_cookie(ask_with_token):
    answer = ask_with_token(f"/?token={ask_with_token.token}")
    assert answer.status == 200
    cookie, *attributes = answer.headers["Set-Cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(attributes)
    assert ask_with_token.token not in cookie
    for address in WHOLE:
        assert ask_with_token(address, ("Cookie", f"other=1; {cookie}")).status == 200
    # A site that makes the browser ask is refused all the same.
    assert ask_with_token("/api/runs", ("Cookie", cookie), ("Sec-Fetch-Site", "same-site")).status == 403


def test_elsewhere_asks_for_a_token_and_knows_its_names(history):
    with served(history, host="0.0.0.0", allowed_hosts=("gpu.example",)) as asker:
        assert len(asker.token) >= 32
        for host in ("192.0.2.7:80", "gpu.example", socket.gethostname(), "[2001:db8::1]"):
            assert asker("/", host=host).status == 403
            assert asker(f"/?token={asker.token}", host=host).status == 200
        assert asker(f"/?token={asker.token}", host="evil.example").status == 421


def test_every_server_has_its_own_secrets(history):
    with served(history, token=True) as one, served(history, token=True) as other:
        assert one.token != other.token
        assert other(f"/?token={one.token}").status == 403


# -- what a browser is told --------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [*WHOLE, "/nothing", "/api/overview?run=x", "/api/block?run=0.1&block=x"])
def test_every_answer_carries_the_policy(ask, address):
    for answer in (ask(address), ask(address, method="POST"), ask(address, host="evil.example")):
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert answer.headers["Access-Control-Allow-Origin"] is None
        assert answer.headers["Server"] is None
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"unsafe|\*|https?:|data:", policy)


def test_the_page_has_nothing_inline_and_nothing_foreign():
    found = {name: content.decode() for name, content in static_files().items()}
    page = found["index.html"]
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", page)
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {
        "/static/icon.svg",
        "/static/style.css",
        "#runs-shown",
        *(f"/static/{name}" for name in found if name.endswith(".js")),  # asked for at once, not one by one
    }
    for name, text in found.items():
        assert set(re.findall(r"\w+://[^\s\"']*", text)) <= {"http://www.w3.org/2000/svg"}, name
        assert "@import" not in text
        if name.endswith(".js"):
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), (
                name
            )
            assert all(each.startswith("./") for each in re.findall(r'from "([^"]+)"', text)), name
