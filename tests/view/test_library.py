"""Runs that are missing, empty, torn, replaced, copied, or many."""

import shutil

import pytest

from clinometer.record.write.recorder import Recorder
from clinometer.view.errors import ApiError
from clinometer.view.library import Library
from clinometer.vocabulary import STATISTICS
from tests.view.conftest import open_client, record


@pytest.fixture
def library(tmp_path, monkeypatch):
    monkeypatch.setattr("clinometer.view.library.RESCAN_SECONDS", 0.0)
    found = Library(tmp_path)
    yield found
    found.close()


def test_no_runs_is_an_empty_list(tmp_path):
    with open_client(tmp_path) as client:
        assert client.get("/api/runs").json()["runs"] == []
        assert client.get("/api/runs/000000000000").status_code == 404


def test_twenty_runs_are_listed_and_opened(tmp_path):
    for i in range(20):
        record(tmp_path / f"run-{i}", ["w"], steps=3)
    with open_client(tmp_path) as client:
        listed = client.get("/api/runs").json()["runs"]
        assert len({run["id"] for run in listed}) == 20
        for run in listed:
            assert client.get(f"/api/runs/{run['id']}").json()["name"] == run["name"]


def test_an_opened_run_folder_is_its_own_list(tmp_path):
    folder = record(tmp_path / "only", ["w"], steps=3)
    with open_client(folder) as client:
        (run,) = client.get("/api/runs").json()["runs"]
        assert run["folder"] == "only"


def test_a_run_without_steps_says_so_in_every_figure(tmp_path):
    recorder = Recorder(tmp_path / "empty")
    recorder.begin(
        {"name": "e", "started": 1.79e9, "config": {}, "environment": {}, "every": 1}
        | {"statistics": list(STATISTICS), "model": "Net", "optimizers": []}
    )
    recorder.tensors(
        [
            {"id": 0, "name": "w", "shape": [2], "dtype": "float32", "numel": 2}
            | {"group": 0, "layer": None, "kind": "", "position": 0}
        ]
    )
    with open_client(tmp_path) as client:
        (run,) = client.get("/api/runs").json()["runs"]
        assert run["loss"] is None
        assert run["last_step"] is None
        names = ("loss", "lr", "norm", "speed", "noise", "map", "tensor", "ridge", "weight-history")
        query = {"tensor": "w", "index": "1", "lang": "zh"}
        for name in names:
            told = client.get(f"/api/runs/{run['id']}/figure/{name}", params=query).json()
            assert told["figure"] is None, name
            assert told["empty"]
        assert client.get(f"/api/runs/{run['id']}/strip").status_code == 200
        told = client.get(f"/api/runs/{run['id']}/map").json()
        assert told["columns"] == 0
        assert client.get(f"/api/runs/{run['id']}").json()["state"] in ("live", "empty")
    recorder.close("stopped")


def test_a_torn_file_is_named_and_the_others_are_listed(tmp_path):
    record(tmp_path / "good", ["w"], steps=3)
    torn = record(tmp_path / "torn", ["w"], steps=3)
    (torn / "run.sqlite").write_bytes(b"no database at all" * 100)
    with open_client(tmp_path) as client:
        told = client.get("/api/runs", params={"lang": "zh"}).json()
        assert [run["name"] for run in told["runs"]] == ["good"]
        (broken,) = told["broken"]
        assert broken["folder"] == "torn"
        assert broken["text"]


def test_a_file_torn_while_it_is_open_is_a_sentence_not_a_failure(tmp_path):
    folder = record(tmp_path / "r", ["w"], steps=30)
    with open_client(tmp_path) as client:
        identity = client.get("/api/runs").json()["runs"][0]["id"]
        content = bytearray((folder / "run.sqlite").read_bytes())
        content[4096:] = b"\xff" * (len(content) - 4096)
        (folder / "run.sqlite").write_bytes(content)
        for path in ("", "/figure/loss", "/map", "/strip", "/events", "/figure/ridge?tensor=w"):
            answer = client.get(f"/api/runs/{identity}{path}")
            # 200 where SQLite still holds the pages that were good.
            assert answer.status_code in (200, 404, 422), answer.text
            assert answer.status_code == 200 or answer.json()["error"]["text"]
        assert client.get("/api/runs").status_code == 200


def test_a_run_that_vanishes_is_gone_and_not_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr("clinometer.view.library.RESCAN_SECONDS", 0.0)
    folder = record(tmp_path / "r", ["w"], steps=3)
    with open_client(tmp_path) as client:
        identity = client.get("/api/runs").json()["runs"][0]["id"]
        shutil.rmtree(folder)
        answer = client.get(f"/api/runs/{identity}")
        assert answer.status_code == 404
        assert answer.json()["error"]["key"] == "view.no_run"
        assert client.get("/api/runs").json()["runs"] == []


def test_a_run_started_over_in_its_folder_is_another_run(tmp_path, library):
    record(tmp_path / "r", ["w"], steps=3)
    (old,) = library.ids()
    assert library.open(old).info()["last_step"] == 3
    shutil.rmtree(tmp_path / "r")
    record(tmp_path / "r", ["w"], steps=5)
    (new,) = library.ids()
    assert new != old
    assert library.open(new).info()["last_step"] == 5
    with pytest.raises(ApiError):
        library.open(old)


def test_an_old_id_never_opens_the_run_that_took_its_folder(tmp_path, library, monkeypatch):
    record(tmp_path / "r", ["w"], steps=3)
    (old,) = library.ids()
    monkeypatch.setattr("clinometer.view.library.RESCAN_SECONDS", 3600.0)  # the list is not read again
    shutil.rmtree(tmp_path / "r")
    record(tmp_path / "r", ["w"], steps=5)
    with pytest.raises(ApiError):
        library.open(old)


def test_a_copied_run_is_listed_once(tmp_path, library):
    record(tmp_path / "r", ["w"], steps=3)
    shutil.copytree(tmp_path / "r", tmp_path / "copy")
    assert len(library.ids()) == 1


def test_files_that_are_not_used_are_closed_after_a_while(tmp_path, library, monkeypatch):
    monkeypatch.setattr("clinometer.view.library.MAX_OPEN", 2)
    monkeypatch.setattr("clinometer.view.library.CLOSE_AFTER", -1.0)
    for i in range(5):
        record(tmp_path / f"run-{i}", ["w"], steps=2)
    for identity in library.ids() * 2:
        assert library.open(identity).info()["last_step"] == 2
    assert len(library._open) == 2
    assert len(library._leaving) <= 1
