"""Clients that send slowly, read slowly, or come by the thousand: the others are served."""

import contextlib
import http.client
import resource
import socket
import threading
import time

import pytest
import uvicorn

from clinometer.view.http import timeouts
from clinometer.view.http.server import make_app, settings
from tests.view.conftest import record


@pytest.fixture
def port(tmp_path, monkeypatch):
    """The server as `clinometer view` runs it, with timeouts of a test's length; gives its port."""
    monkeypatch.setattr(timeouts, "REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(timeouts, "READER_SECONDS", 1.0)
    record(tmp_path / "r", [f"layers.{i}.w" for i in range(2000)])
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    server = uvicorn.Server(settings(make_app(tmp_path, language="en")))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(timeout=30)
    assert not thread.is_alive()
    listener.close()


def ask(port, path="/api/runs"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path, headers={"Host": f"127.0.0.1:{port}"})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def closed(client, seconds=60):
    """Whether the other side has closed within that time."""
    client.settimeout(seconds)
    try:
        while client.recv(1 << 16):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


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


def test_a_reader_that_does_not_read_is_given_up(port):
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        head = f"GET /api/openapi.json HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"
        # Pipelined: the answers come to some ten megabytes, which no socket holds.
        with contextlib.suppress(ConnectionError):
            client.sendall(head.encode() * 1500)
        time.sleep(3)
        assert ask(port) == 200
        received = 0
        client.settimeout(60)
        with contextlib.suppress(ConnectionError):  # what it had not taken by then is lost
            while part := client.recv(1 << 20):
                received += len(part)
                assert received < 1500 * 8_000, "it was waited for"


def test_a_connection_kept_open_between_requests_stays(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for _ in range(2):
        connection.request("GET", "/api/runs", headers={"Host": f"127.0.0.1:{port}"})
        assert connection.getresponse().read()
        time.sleep(1.5)
    connection.close()


def test_a_thousand_silent_connections_keep_nobody_from_being_answered(port, monkeypatch):
    monkeypatch.setattr(timeouts, "REQUEST_SECONDS", 600.0)  # it is the number that sends them away
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2600
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"this account may open {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    clients = []
    try:
        for i in range(1000):
            client = socket.create_connection(("127.0.0.1", port), timeout=60)
            client.sendall(b"GET /" if i % 2 else b"")
            clients.append(client)
            if i % 100 == 99:
                assert ask(port) == 200, i
        assert ask(port) == 200
        still = sum(not closed(client, 0.001) for client in clients[-timeouts.MOST_WAITING // 2 :])
        assert still > 0  # those who came last have their time
    finally:
        for client in clients:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert ask(port) == 200
