"""wandb, trackio and swanlab themselves, off line: what they wrote down is what the sink was given."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json
import wandb, trackio, swanlab
from clinometer.record.out.trackers import Tracker
from tests.record.test_sinks import feed

class Kept:
    rows = {}
    def log(self, data, *, step): self.rows[step] = data

run = wandb.init(project="p", mode="offline", settings=wandb.Settings(console="off", x_disable_stats=True))
trackio.init("p", name="run", embed=False, auto_log_gpu=False, auto_log_cpu=False)
swanlab.init(project="p", mode="local", logdir="swanlog")
feed(Tracker(Kept(), every=2))
feed(Tracker(trackio, every=2, histogram=lambda *both: trackio.Histogram(np_histogram=both)))
feed(Tracker(swanlab, every=2))
feed(Tracker(run, every=2, histogram=lambda *both: wandb.Histogram(np_histogram=both)))
swanlab.finish()
trackio.finish()
run.finish()
from trackio.sqlite_storage import SQLiteStorage
with open("kept.json", "w") as file:
    json.dump({"kept": Kept.rows, "trackio": SQLiteStorage.get_logs("p", "run")}, file)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three packages in one process of their own: they take hold of streams, hooks and threads."""
    place = tmp_path_factory.mktemp("trackers")
    environment = os.environ | {"TRACKIO_DIR": str(place / "trackio"), "WANDB_SILENT": "true"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return place


@pytest.fixture(scope="module")
def kept(folder: Path) -> dict[int, dict[str, float]]:
    rows = json.loads((folder / "kept.json").read_text())["kept"]
    assert list(rows) == ["1", "2", "3", "4", "5"]
    assert rows["3"]["grad_max/layers.1.weight"] == 113.0
    assert rows["2"]["weight/layers.1.weight[0, 2]"] == 2.0
    assert rows["4"]["validation_loss"] == 0.25
    return {int(step): row for step, row in rows.items()}


def assert_same(found: dict[int, dict], kept: dict[int, dict[str, float]]) -> None:
    assert set(found) == set(kept)
    for step, row in kept.items():
        assert {name: found[step][name] for name in row} == row


def test_trackio_kept_every_number(folder: Path, kept: dict) -> None:
    logs = json.loads((folder / "kept.json").read_text())["trackio"]
    assert_same({row["step"]: row for row in logs}, kept)
    (histogram,) = [row["grad/layers.0.weight"] for row in logs if "grad/layers.0.weight" in row]
    assert (histogram["values"], histogram["bins"]) == ([3, 5], [-8, -7, -6])


def test_wandb_kept_every_number(folder: Path, kept: dict) -> None:
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found = {}
    for data in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {(item.key, *item.nested_key): json.loads(item.value_json) for item in items}
            row = {"|".join(filter(None, key)): value for key, value in row.items()}
            found[row["_step"]] = row
    assert_same(found, kept)
    histogram = [found[2][f"grad/layers.0.weight|{part}"] for part in ("_type", "values", "bins")]
    assert histogram == ["histogram", [3, 5], [-8, -7, -6]]


def test_swanlab_kept_every_number(folder: Path, kept: dict) -> None:
    """logs/<number of a name>/1000.log has the points; the names stand in the transaction log, in order."""
    (path,) = folder.glob("swanlog/run-*/run-*.swanlab")
    points: dict[str, dict[int, float]] = {}
    for log in path.parent.glob("logs/*/*.log"):
        for point in map(json.loads, log.read_text().splitlines()):
            points.setdefault(log.parent.name, {})[point["index"]] = point["data"]
    curves: dict[str, dict[int, float]] = {}
    for step, row in kept.items():
        for name, value in row.items():
            curves.setdefault(name, {})[step] = value
    assert sorted(map(str, map(sorted_items, points.values()))) == sorted(
        map(str, map(sorted_items, curves.values()))
    )
    everything = b"".join(log_records(path.read_bytes()))
    assert all(name.encode() in everything for name in curves)


def sorted_items(curve: dict[int, float]) -> list[tuple[int, float]]:
    return sorted((step, float(value)) for step, value in curve.items())


def log_records(data: bytes):
    """LevelDB's log, which wandb and swanlab write: 32 KiB blocks, 7 bytes before each record or part."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""
