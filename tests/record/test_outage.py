"""A disk that fills up, a file that goes away: one warning, the training goes on, the gap is marked."""

import contextlib
import os
import sqlite3
import subprocess
import sys
import warnings
from itertools import pairwise

import pytest

from clinometer.record.format import schema
from clinometer.record.format.filesystem import is_network
from clinometer.record.read.reader import RunFile
from clinometer.record.write import outage
from tests.record.running import begun, rows_of, statistics


def steps(recorder, first, last, tensors=3):
    for step in range(first, last + 1):
        recorder.step(step, step, {"loss": float(step)}, statistics(step, tensors))


def gaps(folder):
    return [
        (e["data"]["first"], e["data"]["last"], e["data"]["steps"])
        for e in RunFile.open(folder).events("gap")
    ]


@contextlib.contextmanager
def full(recorder, monkeypatch):
    """The database may not grow: SQLite says "database or disk is full", now and when it is tried again."""
    connect = schema.connect

    def connect_full(path, **options):
        connection = connect(path, **options)
        connection.execute("PRAGMA max_page_count = 1")  # it cannot go below the present size
        return connection

    monkeypatch.setattr(schema, "connect", connect_full)
    recorder._file.connection.execute("PRAGMA max_page_count = 1")
    yield
    monkeypatch.setattr(schema, "connect", connect)


def test_a_full_disk_pauses_the_recording_with_one_warning_and_the_gap_is_marked(tmp_path, monkeypatch):
    recorder = begun(tmp_path, tensors=64)
    steps(recorder, 1, 20, 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with full(recorder, monkeypatch):
            steps(recorder, 21, 60, 64)
            recorder.alert({"id": 0, "step": 50, "cause": "dead", "severity": "warning"})
            recorder.event(55, 55.0, "checkpoint", {"path": "x"})
            paused_at = RunFile.open(tmp_path).info()["last_step"]
        assert paused_at < 60
        steps(recorder, 61, 200, 64)
        recorder.close()
    said = [str(w.message) for w in caught if "Recording to" in str(w.message)]
    assert len(said) == 1
    assert "database or disk is full" in said[0]
    run = RunFile.open(tmp_path)
    ((first, last, count),) = gaps(tmp_path)
    recorded = run.scalars(["loss"])["step"].tolist()
    assert first == paused_at + 1
    assert count == last - first + 1
    assert recorded == [step for step in range(1, 201) if not first <= step <= last]
    assert last - paused_at <= 3 * outage.FIRST_WAIT + 60
    assert [e["step"] for e in run.events("checkpoint")] == [55]
    assert [a["step"] for a in run.alerts()] == [50]
    assert run.info()["state"] == "done"
    assert run.scalars(["loss"], points=2)["loss"]["max"].tolist()[-1] == 200


def test_a_write_that_really_fails_leaves_a_readable_file(tmp_path):
    """The system refuses to let any file grow beyond 400 kB (as a quota does), and the training ends well."""
    script = """
import resource, sys, warnings
from pathlib import Path
from clinometer.record.read.reader import RunFile
from tests.record.running import begun, statistics
warnings.simplefilter("always")
recorder = begun(Path(sys.argv[1]), tensors=64)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
for step in range(1, 1001):
    recorder.step(step, step, {"loss": 1.0}, statistics(step, 64))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for step in range(1001, 1101):
    recorder.step(step, step, {"loss": 1.0}, statistics(step, 64))
recorder.close()
"""
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=os.getcwd()
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("RuntimeWarning") == 1
    run = RunFile.open(tmp_path)
    assert run.info()["state"] == "done"
    found = [event["data"] for event in run.events("gap")]
    assert found
    recorded = run.rows(limit=2000)["step"].tolist()
    missing = sum(gap["steps"] for gap in found)
    assert len(recorded) + missing == 1100 or recorded[-1] < 1100
    connection = sqlite3.connect(tmp_path / "run.sqlite")
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("how", ["moved away", "replaced"])
def test_a_file_that_vanishes_is_missed_and_taken_up_again_when_it_is_back(tmp_path, how):
    recorder = begun(tmp_path / "run")
    steps(recorder, 1, 10)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    if how == "replaced":
        begun(tmp_path / "run").close()
    with pytest.warns(RuntimeWarning, match="No such file") as caught:
        steps(recorder, 11, 40)
    assert len(caught) == 1
    if how == "replaced":
        (tmp_path / "run").rename(tmp_path / "the other")
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    steps(recorder, 41, 120)
    recorder.close()
    ((first, last, _),) = gaps(tmp_path / "run")
    assert first == 11
    assert 40 <= last < 120
    assert RunFile.open(tmp_path / "run").info()["last_step"] == 120


def test_a_recording_that_never_recovers_ends_without_an_exception(tmp_path):
    recorder = begun(tmp_path / "run")
    steps(recorder, 1, 3)
    (tmp_path / "run").rename(tmp_path / "gone")
    with pytest.warns(RuntimeWarning):
        steps(recorder, 4, 100)
    recorder.close("done")
    assert not (tmp_path / "run").exists()
    run = RunFile.open(tmp_path / "gone")
    assert (run.info()["last_step"], run.info()["state"]) == (3, "live")


def test_the_wait_between_tries_doubles_up_to_1024_steps():
    pause = outage.Outage("run.sqlite", OSError("x"))
    tries = []
    for step in range(6000):
        if pause.is_due(step):
            tries.append(step + 1)
            pause.failed_again(step)
    assert tries[:4] == [16, 48, 112, 240]
    assert {b - a for a, b in pairwise(tries[6:])} == {1024}
    assert pause.gap()["steps"] == 6000


@pytest.mark.parametrize(
    ("mounts", "expected"),
    [
        ("/dev/sda / ext4 rw 0 0", False),
        ("/dev/sda / ext4 rw 0 0\nhost:/x {path} nfs4 rw 0 0", True),
        ("//host/x {parent} cifs rw 0 0", True),
        ("s3 {path} fuse.sshfs rw 0 0", True),
        ("/dev/sdb {path} fuseblk rw 0 0", False),
        ("host:/x {path} nfs rw 0 0\ntmpfs {path} tmpfs rw 0 0", False),
        ("host:/x {path}/below nfs rw 0 0", False),
        ("", False),
    ],
)
def test_network_file_systems_are_told_by_their_mount(tmp_path, mounts, expected):
    folder = tmp_path / "a run"
    folder.mkdir()
    escaped = str(folder.resolve()).replace(" ", "\\040")
    file = tmp_path / "mounts"
    file.write_text(mounts.format(path=escaped, parent=folder.resolve().parent))
    assert is_network(folder, file) is expected


def test_on_a_network_file_system_there_is_no_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("clinometer.record.write.writer_file.is_network", lambda folder: True)
    recorder = begun(tmp_path)
    run = RunFile.open(tmp_path)
    for step in range(1, 41):
        recorder.step(step, step, {"loss": 1.0}, statistics(step, 3))
        assert run.row(step) is not None
    names = {path.name for path in tmp_path.iterdir()}
    assert "run.sqlite-wal" not in names
    assert "run.sqlite-shm" not in names
    assert recorder._file.execute("PRAGMA journal_mode").fetchone() == ("truncate",)
    recorder.close()
    assert len(rows_of(tmp_path)["steps"]) == 40
