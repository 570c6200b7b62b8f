"""Who is let in: host names, tokens, other sites' pages; and what a page may do."""

import json
import os
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from clinometer.view.http.safety import HEADERS, POLICY, hosts_for, is_loopback
from clinometer.view.http.server import make_app
from tests.view.conftest import BASE, EVIL, OWN, open_client, record

TOKEN = "a-secret-token"


@pytest.mark.parametrize("host", ["127.0.0.1:8713", "localhost:8713", "[::1]:8713", "LOCALHOST:8713"])
def test_this_machines_names_are_served(client, host):
    assert client.get("/api/runs", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8713",
        "evil.example",
        "127.0.0.1",
        "127.0.0.1:80",
        "127.0.0.1:8714",
        "127.0.0.1.evil.example:8713",
        "localhost.evil.example:8713",
        "192.168.1.7:8713",
        "[::2]:8713",
        "127.0.0.1:8713@evil.example",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/", "/api/runs", "/api/live", "/static/x/app.js"])
def test_a_rebound_name_reads_nothing(client, host, path):
    answer = client.get(path, headers={"host": host})
    assert answer.status_code == 421
    assert "127.0.0.1" in answer.text
    assert "runs" not in answer.text


def test_an_allowed_host_is_served_with_its_own_port(runs):
    with open_client(runs, allowed_hosts=["box.lan", "proxy.lan:9000"]) as client:
        assert client.get("/api/runs", headers={"host": "box.lan:8713"}).status_code == 200
        assert client.get("/api/runs", headers={"host": "proxy.lan:9000"}).status_code == 200
        assert client.get("/api/runs", headers={"host": "proxy.lan:9001"}).status_code == 421


def test_all_addresses_means_addresses_and_this_machines_names_only():
    names = hosts_for("0.0.0.0")
    assert "*ip" in names
    assert "evil.example" not in names
    assert hosts_for("127.0.0.1") == {"127.0.0.1", "localhost", "[::1]"}
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "10.0.0.1", "x.lan")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


def test_with_a_token_nothing_is_told_without_it(runs):
    with open_client(runs, token=TOKEN) as client:
        for path in ("/", "/api/runs", "/api/live", "/api/openapi.json"):
            for answer in (
                client.get(path),
                client.get(path, headers={"authorization": "Bearer wrong"}),
                client.get(path, headers={"cookie": "clinometer_8713=wrong"}),
                client.get(path, params={"token": "wrong"}),
            ):
                assert answer.status_code == 401
                assert TOKEN not in answer.text
        assert client.get("/api/runs", params={"token": TOKEN}).status_code == 401  # in the page's URL only


def test_the_token_moves_from_the_url_to_a_cookie_no_script_reads(runs):
    with open_client(runs, token=TOKEN) as client:
        answer = client.get("/", params={"token": TOKEN, "run": 'a"b', "lang": "zh"})
        assert answer.status_code == 200
        assert TOKEN not in answer.text
        assert 'url=/?run=a%22b&amp;lang=zh"' in answer.text
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "samesite=strict" in cookie.lower()
        assert answer.headers["cache-control"] == "no-store"
        assert client.get("/api/runs").status_code == 200
        assert client.get("/").status_code == 200
    with open_client(runs, token=TOKEN) as client:
        assert client.get("/api/runs", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-clinometer": "1"},
        {"origin": BASE},
        {"x-clinometer": "1", "origin": "http://evil.example"},
        {"x-clinometer": "1", "origin": "http://127.0.0.1:9999"},
        {"x-clinometer": "1", "origin": "null"},
        {"x-clinometer": "1", "sec-fetch-site": "cross-site"},
        {"x-clinometer": "1", "sec-fetch-site": "same-site"},
        {"x-clinometer": "1", "origin": BASE, "sec-fetch-site": "same-site"},
        {"x-clinometer": "1", "origin": BASE, "sec-fetch-site": "none"},
    ],
)
def test_another_sites_page_can_start_and_cancel_nothing(client, identity, headers, monkeypatch):
    monkeypatch.setattr("clinometer.view.jobs.Replays.start", forbidden)
    path = f"/api/runs/{identity}/replay"
    assert client.post(path, json={"step": 1}, headers=headers).status_code == 403
    assert client.delete("/api/jobs/0", headers=headers).status_code == 403


def forbidden(*arguments):
    raise AssertionError("a replay was started")


def test_a_form_cannot_post(client, identity):
    path = f"/api/runs/{identity}/replay"
    assert client.post(path, data={"step": "1"}, headers=OWN).status_code == 415
    answer = client.post(path, content="{}", headers={**OWN, "content-type": "text/plain"})
    assert answer.status_code == 415


def test_another_sites_page_cannot_read(client):
    for site in ("cross-site", "same-site"):
        assert client.get("/api/runs", headers={"sec-fetch-site": site}).status_code == 403
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200  # a link to the page


@pytest.mark.parametrize(
    "path",
    [
        "/static/../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/pyproject.toml",
        "/static/HASH/..%2fserver.py",
        "/static/HASH/../server.py",
        "/static/HASH//etc/passwd",
        "/static/HASH/%00",
        "/static/HASH/server.py",
        "/static/HASH/.",
        "/api/runs/..%2f..%2fetc",
        "/api/runs/../../etc/passwd",
        "/api/runs/%2e%2e/figure/loss",
        "/run.sqlite",
        "//etc/passwd",
    ],
)
def test_no_path_of_a_url_reaches_the_disk(client, path):
    hash_of = client.app.state.pages.hash
    answer = client.get(path.replace("HASH", hash_of))
    assert answer.status_code in (403, 404)
    assert "root:" not in answer.text
    assert "import" not in answer.text


def test_every_answer_carries_the_policy(client, identity):
    answers = [
        client.get("/"),
        client.get("/api/runs"),
        client.get(f"/api/runs/{identity}/figure/loss"),
        client.get("/nothing"),
        client.get("/api/runs", headers={"host": "evil.example"}),
        client.post("/api/runs"),
    ]
    for answer in answers:
        for name, value in HEADERS.items():
            assert answer.headers[name] == value
    assert "unsafe" not in POLICY
    assert "default-src 'none'" in POLICY
    assert "frame-ancestors 'none'" in POLICY
    assert "*" not in POLICY


def test_the_page_has_no_inline_script_style_or_handler_and_loads_from_itself_only(client):
    page = client.get("/").text
    head = page.lower()
    assert "<style" not in head
    assert " style=" not in head
    assert "javascript:" not in head
    assert " on" + "click=" not in head
    for part in head.split("<script")[1:]:
        attributes, _, rest = part.partition(">")
        assert 'src="/static/' in attributes
        assert rest.partition("</script>")[0].strip() == ""
    assert "http://" not in head.replace("http://www.w3.org", "")
    assert "https://" not in head


def test_static_files_are_kept_forever_under_the_hash_of_their_content(client):
    page = client.get("/").text
    paths = {part.partition('"')[0] for part in page.split('"/static/')[1:]}
    prefix = client.app.state.pages.hash
    assert all(path.startswith(prefix) for path in paths)
    for path in paths | {f"{prefix}/{name}" for name in client.app.state.pages.files}:
        answer = client.get(f"/static/{path}")
        assert answer.status_code == 200, path
        assert "immutable" in answer.headers["cache-control"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    name = next(iter(paths)).partition("/")[2]
    assert client.get(f"/static/0000000000000000/{name}").status_code == 404


def test_names_from_a_run_file_are_data_and_never_html(tmp_path):
    record(tmp_path / "r", [EVIL], name="<b>run</b>", config={"x": EVIL})
    with open_client(tmp_path) as client:
        listed = client.get("/api/runs")
        assert listed.headers["content-type"] == "application/json"
        (run,) = listed.json()["runs"]
        assert run["name"] == "<b>run</b>"
        for figure in (f"tensor?tensor={EVIL}", "map", f"ridge?tensor={EVIL}"):
            told = client.get(f"/api/runs/{run['id']}/figure/{figure}").json()
            if told["figure"]:  # Plotly reads a few tags in its labels: none of ours may be one
                assert "<img" not in json.dumps(told["figure"])
        told = client.get("/api/compare", params={"ids": run["id"]}).json()
        assert "<b>" not in json.dumps(told["figure"])


def test_bodies_and_urls_have_their_limits(client, identity):
    path = f"/api/runs/{identity}/replay"
    headers = {**OWN, "content-type": "application/json"}
    assert client.post(path, content=b" " * 5000, headers=headers).status_code == 413
    assert client.post(path, content=b"{", headers=headers).status_code == 400
    assert client.post(path, content=b"[" * 4000, headers=headers).status_code == 400
    assert client.post(path, content=b"[1]", headers=headers).status_code == 400
    assert client.get("/api/runs", params={"x": "y" * 9000}).status_code == 414


@pytest.mark.parametrize(
    "body",
    [
        {"step": -1},
        {"step": True},
        {"step": "3"},
        {"step": 1e9},
        {},
        {"step": 3, "index": [1]},
        {"step": 3, "tensor": "layers.1.attn.v_proj.weight"},
        {"step": 3, "tensor": "layers.1.attn.v_proj.weight", "index": [1]},
        {"step": 3, "tensor": "layers.1.attn.v_proj.weight", "index": [1, 99999]},
        {"step": 3, "tensor": "layers.1.attn.v_proj.weight", "index": [1, -1]},
        {"step": 3, "tensor": "layers.1.attn.v_proj.weight", "index": [True, 1]},
        {"step": 3, "tensor": "nobody", "index": [1, 1]},
        {"step": 3, "tensor": ["a"], "index": [1, 1]},
    ],
)
def test_a_replay_of_nonsense_is_refused_before_it_starts(client, identity, body, monkeypatch):
    monkeypatch.setattr("clinometer.view.jobs.Replays.start", forbidden)
    answer = client.post(f"/api/runs/{identity}/replay", json=body, headers=OWN)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["error"]["text"]


def test_the_server_writes_nothing(tmp_path):
    record(tmp_path / "r", ["w"])
    before = contents(tmp_path)
    with open_client(tmp_path) as client:
        identity = client.get("/api/runs").json()["runs"][0]["id"]
        for path in ("", "/map", "/strip", "/figure/loss", "/replays", "/reports"):
            client.get(f"/api/runs/{identity}{path}")
    assert contents(tmp_path) == before


def contents(root: Path) -> dict[str, bytes]:
    return {
        os.path.relpath(path, root): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.endswith(("-shm", "-wal"))  # SQLite's own, of a file in use
    }


def test_without_a_page_of_ours_a_failure_still_has_the_headers(runs, monkeypatch):
    monkeypatch.setattr("clinometer.view.http.api_runs.strip", forbidden)
    with TestClient(make_app(runs), base_url=BASE, raise_server_exceptions=False) as client:
        identity = client.get("/api/runs").json()["runs"][0]["id"]
        answer = client.get(f"/api/runs/{identity}/strip")
        assert answer.status_code == 500
        assert answer.json()["error"]["key"] == "view.failed"
        assert answer.headers["content-security-policy"] == POLICY
