"""Starting and ending the server."""

import signal
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("uvicorn", reason="the live page needs starlette and uvicorn")

from peelwise.errors import OptionError
from peelwise.show.dashboard.serve import Address, Server, is_loopback
from runs import write_run
from show.dashboard.asking import Asker

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("host", "near"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("127.9.9.9", True), ("0.0.0.0", False), ("::", False),
     ("192.0.2.1", False), ("localhost.example", False)],
)  # fmt: skip
def test_what_is_loopback(host, near):
    assert is_loopback(host) is near


def test_a_taken_port(tmp_path):
    path = write_run(tmp_path / "run.db")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(OptionError, match="Choose another --port"):
            Server([path], Address(port=other.getsockname()[1]))


def test_bad_input_is_one_line(run, tmp_path):
    code, _, error = run("serve", tmp_path / "none.db", "--no-open")
    assert (code, "No run history at" in error) == (2, True)
    foreign = tmp_path / "foreign.db"
    foreign.write_text("no database")
    code, _, error = run("serve", foreign, "--no-open")
    assert (code, "no SQLite file" in error) == (2, True)
    code, _, error = run("serve", write_run(tmp_path / "run.db"), "--host", "no.such.host.invalid", "--no-open")
    assert (code, "cannot be listened at" in error) == (2, True)


def test_without_the_extra(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, error = run("serve", write_run(tmp_path / "run.db"), "--no-open")
    assert (code, 'pip install "peelwise[dashboard]"' in error) == (2, True)


def test_it_serves_without_torch_and_ends_at_control_c(tmp_path):
    path = write_run(tmp_path / "run.db")
    code = "import sys; sys.modules.update(torch=None, transformers=None); import peelwise.cli.main as m; m.main()"
    command = [sys.executable, "-c", code, "serve", str(path), "--port", "0", "--no-open"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().split()[-1]
        asker = Asker.__new__(Asker)
        asker.port = int(url.split(":")[2].strip("/"))
        for _ in range(100):
            try:
                stream = asker.connected("/api/stream?from=0.1@40.4.1").getresponse()
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        assert stream.readline() == b"retry: 1000\n"  # an open page does not hold it back
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
