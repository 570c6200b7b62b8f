"""Files of older versions open, and newer ones are refused with the remedy."""

import gzip
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from clinometer.messages import InputError
from clinometer.record.format import schema
from clinometer.record.read.reader import RunFile
from clinometer.record.write.recorder import Recorder
from tests.record.running import begun, recorded, rows_of, statistics
from tests.record.test_damage import ASKED

DATA = Path(__file__).parent / "data"
"""version-1.sqlite.gz: `python -m tests.record.synthetic FOLDER --steps 300 --layers 0`, written by version 1
and never again: what it holds must stay readable whatever VERSION comes to."""


@pytest.fixture
def version_1(tmp_path):
    (tmp_path / "run.sqlite").write_bytes(gzip.decompress((DATA / "version-1.sqlite.gz").read_bytes()))
    return tmp_path


def test_a_file_of_version_1_opens_and_answers(version_1):
    connection = sqlite3.connect(version_1 / "run.sqlite")
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    assert connection.execute("PRAGMA application_id").fetchone() == (0x436C696E,)
    connection.close()
    run = RunFile.open(version_1)
    for question in ASKED[:10]:
        question(run)
    info = run.info()
    assert (info["state"], info["first_step"], info["last_step"]) == ("done", 1, 300)
    assert [tensor["name"] for tensor in run.tensors()] == ["token_embeddings.weight", "lm_head.weight"]
    row = run.row(100)
    assert row["scalars"]["taken"] == 0.0
    assert row["scalars"]["loss"] == pytest.approx(2.9387665912640473, abs=0)
    assert np.isinf(row["statistics"][1, 0])
    assert run.series([0], "grad_norm", points=1)["stride"] == 512
    assert [alert["cause"] for alert in run.alerts()] == ["non-finite", "dead"]
    assert len(run.weight(1, [3, 5])["step"]) == 300
    assert run.histograms(1, "grad")["counts"][:, 0].tolist() == [12] * 18


def test_a_run_of_version_1_can_be_continued(version_1):
    tensors = RunFile.open(version_1).tensors()
    recorder = Recorder(version_1, continue_from=200)
    recorder.tensors(tensors)
    recorder.step(201, 1.0, {"loss": 1.0}, statistics(201, 2))
    recorder.close()
    assert RunFile.open(version_1).info()["last_step"] == 201


@pytest.fixture
def next_version(monkeypatch):
    """A version 2 that would keep events under another name."""
    version = schema.VERSION
    monkeypatch.setattr(schema, "VERSION", version + 1)
    monkeypatch.setitem(
        schema.UPGRADES,
        version,
        "ALTER TABLE scalar_names ADD COLUMN unit TEXT; UPDATE scalar_names SET unit = 'nat'",
    )
    monkeypatch.setitem(
        schema.VIEWS,
        version,
        "CREATE TEMP VIEW scalar_names AS SELECT *, 'nat' AS unit FROM main.scalar_names",
    )
    return version


def test_a_reader_sees_an_older_file_as_one_of_its_own_version_and_leaves_it_as_it_is(
    version_1, next_version
):
    before = (version_1 / "run.sqlite").read_bytes()
    run = RunFile.open(version_1)
    assert run._connection.execute("SELECT DISTINCT unit FROM scalar_names").fetchall() == [("nat",)]
    assert "loss" in run.scalar_names()
    run.close()
    assert (version_1 / "run.sqlite").read_bytes() == before


def test_a_writer_brings_an_older_file_up_to_its_version(version_1, next_version):
    Recorder(version_1, continue_from=300).close()
    connection = sqlite3.connect(version_1 / "run.sqlite")
    assert connection.execute("PRAGMA user_version").fetchone() == (next_version + 1,)
    assert connection.execute("SELECT DISTINCT unit FROM scalar_names").fetchall() == [("nat",)]
    connection.close()


def test_an_upgrade_that_fails_leaves_the_file_as_it_was(version_1, next_version, monkeypatch):
    monkeypatch.setitem(schema.UPGRADES, next_version, "DELETE FROM events; SELECT * FROM nowhere")
    before = rows_of(version_1)
    with pytest.raises(InputError):
        Recorder(version_1, continue_from=300)
    assert rows_of(version_1) == before
    monkeypatch.undo()
    Recorder(version_1, continue_from=300).close()


def test_a_newer_file_is_refused_with_the_remedy(tmp_path):
    recorded(tmp_path, 3)
    connection = sqlite3.connect(tmp_path / "run.sqlite")
    connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    connection.close()
    for attempt in (
        lambda: RunFile.open(tmp_path),
        lambda: Recorder(tmp_path, 3),
        lambda: Recorder(tmp_path),
    ):
        with pytest.raises(InputError, match=rf"version {schema.VERSION + 1}.*pip install -U clinometer"):
            attempt()


def test_every_older_version_has_its_upgrade_and_its_view():
    assert set(schema.UPGRADES) == set(schema.VIEWS) == set(range(1, schema.VERSION))


def test_the_file_says_what_it_is(tmp_path):
    begun(tmp_path).close()
    header = (tmp_path / "run.sqlite").read_bytes()[:100]
    assert header[68:72] == b"Clin"
    assert int.from_bytes(header[60:64], "big") == schema.VERSION
