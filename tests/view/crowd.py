"""A thousand silent connections: `python -m tests.view.crowd FOLDER`, for the files that it may open."""

from __future__ import annotations

import contextlib
import http.client
import resource
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from clinometer.view.http import timeouts
from clinometer.view.http.server import make_app, settings
from tests.view.conftest import record

NEEDED = 2600
"""Files: both ends of a thousand connections, and what the process has open."""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[int, uvicorn.Server]]:
    """The server as `clinometer view` runs it, on a run of 2,000 tensors, and its port."""
    record(folder / "r", [f"layers.{i}.w" for i in range(2000)])
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    server = uvicorn.Server(settings(make_app(folder, language="en")))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield listener.getsockname()[1], server
    server.should_exit = True
    thread.join(timeout=300)
    assert not thread.is_alive()
    listener.close()


def ask(port: int, path: str = "/api/runs") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("GET", path, headers={"Host": f"127.0.0.1:{port}"})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def closed(client: socket.socket, seconds: float = 300) -> bool:
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


def main(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, NEEDED), hard))
    timeouts.REQUEST_SECONDS = 3600.0  # it is the number that sends them away
    clients = []
    with served(folder) as (port, _):
        for i in range(1000):
            client = socket.create_connection(("127.0.0.1", port), timeout=300)
            client.sendall(b"GET /" if i % 2 else b"")
            clients.append(client)
            if i % 100 == 99:
                assert ask(port) == 200, i
        assert ask(port) == 200
        still = sum(not closed(client, 0.001) for client in clients[-timeouts.MOST_WAITING // 2 :])
        assert still > 0  # those who came last have their time
        for client in clients:
            client.close()
        assert ask(port) == 200


if __name__ == "__main__":
    main(Path(sys.argv[1]))
