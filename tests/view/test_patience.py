"""Clients that send slowly, read slowly, or come by the thousand: the others are served."""

import contextlib
import http.client
import resource
import socket
import subprocess
import sys
import time

import pytest

from clinometer.view.http import timeouts
from tests.view.crowd import NEEDED, ask, closed, served


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The server with timeouts of a test's length, and its port."""
    monkeypatch.setattr(timeouts, "REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(timeouts, "READER_SECONDS", 1.0)
    with served(tmp_path) as (port, server):
        yield port, server


@pytest.fixture
def port(server):
    return server[0]


@pytest.fixture
def unhurried(monkeypatch):
    """For requests that are sent at once, to a server that may be kept waiting by a busy machine."""
    monkeypatch.setattr(timeouts, "REQUEST_SECONDS", 300.0)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /api/runs HTT",
        b"GET /api/runs HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow:",
        b"POST /api/runs/x/replay HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"X-Clinometer: 1\r\nSec-Fetch-Site: same-origin\r\nContent-Length: 500\r\n\r\n{",
    ],
    ids=["nothing", "half a line", "half a head", "half a body"],
)
def test_a_request_that_is_never_finished_is_given_up(port, sent):
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(sent)
        assert closed(client)


def test_a_request_sent_byte_by_byte_gains_no_time(port):
    with socket.create_connection(("127.0.0.1", port)) as client, contextlib.suppress(ConnectionError):
        for _ in range(600):
            client.sendall(b"G")
            time.sleep(0.02)
        pytest.fail("it may go on for ever")


def test_a_reader_that_does_not_read_is_given_up(server, unhurried):
    port, running = server
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        head = f"GET /api/openapi.json HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"
        # Pipelined: the answers come to some ten megabytes, which no socket holds.
        with contextlib.suppress(ConnectionError):
            client.sendall(head.encode() * 1500)
        assert ask(port) == 200
        while running.server_state.connections:  # until it has closed ours, of which we see nothing
            time.sleep(0.05)
        received = 0
        client.settimeout(300)
        with contextlib.suppress(ConnectionError):  # what it had not taken by then is lost
            while part := client.recv(1 << 20):
                received += len(part)
                assert received < 1500 * 8_000, "it was waited for"


def test_a_connection_kept_open_between_requests_stays(port, monkeypatch):
    monkeypatch.setattr(timeouts, "REQUEST_SECONDS", 3.0)  # enough for a request on a busy machine
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    for pause in (3.5, 0.0):
        connection.request("GET", "/api/runs", headers={"Host": f"127.0.0.1:{port}"})
        assert connection.getresponse().read()
        time.sleep(pause)
    connection.close()


def test_a_thousand_silent_connections_keep_nobody_from_being_answered(tmp_path):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < NEEDED:
        pytest.skip(f"this account may open {hard} files")
    command = [sys.executable, "-m", "tests.view.crowd", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
