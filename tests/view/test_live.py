"""The live stream, and the server as it really runs: a socket, a port, an end."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from clinometer.messages import InputError
from clinometer.record.read.reader import RunFile
from clinometer.record.write.recorder import Recorder
from clinometer.view.errors import ApiError
from clinometer.view.http.safety import hosts_for
from clinometer.view.http.server import _listen, serve
from clinometer.view.live import LISTENERS, Live
from tests.view.conftest import record

PATIENCE = 300.0


class Asked:
    query_params: dict = {}  # noqa: RUF012


def test_only_what_is_new_is_told_and_nothing_is_read_when_nobody_listens(monkeypatch):
    monkeypatch.setattr("clinometer.view.live.SECONDS", 0.01)
    states = {"a": {"run": "a", "version": 1}}
    looked = []

    def look(wanted):
        looked.append(wanted)
        return {name: dict(state) for name, state in states.items()}

    async def listen():
        live = Live(look)
        stream = live._stream("a")
        heard = []

        async def hear():
            async for part in stream:
                if part.startswith(b"data: "):
                    heard.append(json.loads(part[6:])["version"])
                    if heard == [1]:
                        states["b"] = {"run": "b", "version": 9}
                        await asyncio.sleep(0.1)
                        states["a"] = {"run": "a", "version": 2}
                    elif heard == [1, 2]:
                        return

        await asyncio.wait_for(hear(), PATIENCE)
        await stream.aclose()
        await asyncio.sleep(0.1)
        count = len(looked)
        await asyncio.sleep(0.1)
        assert len(looked) == count
        assert looked[0] == {"a"}
        await live.close()
        return heard

    assert asyncio.run(listen()) == [1, 2]


def test_a_reading_that_fails_does_not_end_the_stream(monkeypatch):
    monkeypatch.setattr("clinometer.view.live.SECONDS", 0.01)
    answers = iter([OSError("gone"), {"a": {"run": "a", "version": 1}}])

    def look(wanted):
        answer = next(answers, {"a": {"run": "a", "version": 1}})
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def listen():
        live = Live(look)
        stream = live._stream(None)
        async for part in stream:
            if part.startswith(b"data: "):
                break
        await stream.aclose()
        await live.close()

    asyncio.run(asyncio.wait_for(listen(), PATIENCE))


def test_there_are_only_so_many_listeners():
    async def crowd():
        live = Live(lambda wanted: {})
        live._listeners = {asyncio.Event(): None for _ in range(LISTENERS)}
        with pytest.raises(ApiError) as crowded:
            await live.answer(Asked())
        assert crowded.value.status == 503

    asyncio.run(crowd())


@pytest.fixture
def server(tmp_path):
    """A real server on a free port, in a process of its own; (process, port, run's id)."""
    folder = record(tmp_path / "runs" / "r", ["w"], steps=5)
    found = RunFile.open(folder)
    identity = found.id
    found.close()
    code = (
        "import sys; from pathlib import Path; from clinometer.view.http.server import serve;"
        "serve(Path(sys.argv[1]), port=0, open_browser=False, announce=lambda a: print(a, flush=True))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "runs")],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    address = process.stdout.readline().strip()
    yield process, int(address.rstrip("/").rpartition(":")[2]), identity, folder
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_page_hears_of_a_new_step_and_ctrl_c_ends_the_server_although_it_listens(server):
    process, port, identity, folder = server
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("GET", f"/api/live?run={identity}")
    answer = connection.getresponse()
    assert answer.headers["content-type"].startswith("text/event-stream")

    def hear():
        while not (line := answer.readline()).startswith(b"data: "):
            assert line, "the stream ended"
        return json.loads(line[6:])

    first = hear()
    assert (first["run"], first["last_step"], first["state"]) == (identity, 5, "done")
    recorder = Recorder(folder, continue_from=5)
    recorder.step(6, 1.79e9 + 6, {"loss": 1.0}, np.ones((1, 8), np.float32))
    recorder.close("done")
    while (told := hear())["last_step"] != 6 or told["state"] != "done":
        assert told["version"] != first["version"]
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 0  # the connection is open still
    connection.close()


def test_the_real_server_refuses_foreign_names(server):
    _, port, _, _ = server
    for host, status in ((f"127.0.0.1:{port}", 200), ("evil.example", 421), (f"127.0.0.1:{port + 1}", 421)):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        connection.request("GET", "/api/runs", headers={"Host": host})
        assert connection.getresponse().status == status
        connection.close()


def test_a_port_in_use_is_passed_over_or_said():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError) as refused:
            _listen("127.0.0.1", port)
        assert refused.value.key == "view.port"
    one = _listen("127.0.0.1", None)
    two = _listen("127.0.0.1", None)
    assert one.getsockname()[1] != two.getsockname()[1]
    one.close()
    two.close()


@pytest.mark.parametrize(
    ("host", "port", "token", "key"),
    [
        ("0.0.0.0", 0, None, "view.token_needed"),
        ("::", 0, None, "view.token_needed"),
        ("192.0.2.1", 0, "t", "view.no_address"),
        ("no.such.host.invalid", 0, "t", "view.no_address"),
        ("127.0.0.1", 70_000, None, "view.no_port"),
    ],
)
def test_an_address_that_cannot_be_served_is_refused(tmp_path, host, port, token, key):
    with pytest.raises(InputError) as refused:
        serve(tmp_path, host, port, token=token, open_browser=False)
    assert refused.value.key == key
    assert refused.value.render("zh")


def test_a_server_for_other_machines_tells_both_its_addresses_with_the_token(tmp_path, monkeypatch):
    monkeypatch.setattr("clinometer.view.http.server._Server.run", lambda self, sockets: None)
    told = []
    serve(tmp_path, "0.0.0.0", 0, token="a b&c", open_browser=False, announce=told.append, path="/?run=1")
    assert len(told) == 2
    assert told[0].startswith("http://127.0.0.1:")
    assert told[1].startswith(f"http://{socket.gethostname().lower()}:")
    assert all(address.endswith("/?run=1&token=a%20b%26c") for address in told)
    assert hosts_for("0.0.0.0") >= {socket.gethostname().lower(), "*ip"}
