"""The tables of a run file, their version, and what makes files of other versions readable.

The format is documented in docs/en/run-file.md. To change it, raise VERSION, add to UPGRADES what
turns the version before into it, and to VIEWS what lets a reader see the version before as if it were it.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from clinometer.vocabulary import STATISTICS
from clinometer.whole_files import whole_file

FILE_NAME = "run.sqlite"
LOCK_NAME = ".run.sqlite.lock"
APPLICATION_ID = 0x436C696E
"""The letters "Clin"; `file` and SQLite's own tools show it."""
VERSION = 1
PAGE_SIZE = 4096
"""A step of 300 tensors changes three pages of this size, and all that a commit writes is changed pages."""

LEVELS = (16, 256, 4096)
"""Steps in one roll-up, level by level; each is 16 of the one before."""

PARTS = ("mean", "low", "high")
"""What a roll-up keeps of a statistic, a row each: a query for means reads a third of the bytes."""

LAST_STEP = (1 << 40) - 1
"""The last step there is place for in a roll-up's key."""


def rollup_key(statistic: int, part: int, start: int) -> int:
    """(3 · statistic + part) · 2^40 + first step: one part of one statistic lies together on the disk."""
    return (len(PARTS) * statistic + part) << 40 | start


ABSENT = 0x7FF8_0000_0000_0001
"""The bits of a float64 that mean "not logged at this step"; a logged NaN has the bits 0x7FF8000000000000."""

WEIGHT_FIELDS = (
    "before",
    "after",
    "grad",
    "clip",
    "exp_avg_before",
    "exp_avg_after",
    "exp_avg_sq_before",
    "exp_avg_sq_after",
    "lr",
    "weight_decay",
)

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE tensors (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, shape TEXT NOT NULL, dtype TEXT NOT NULL,
    numel INTEGER NOT NULL,
    param_group INTEGER, layer INTEGER, kind TEXT, position INTEGER NOT NULL, since INTEGER NOT NULL);
CREATE TABLE scalar_names (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, since INTEGER NOT NULL);
CREATE TABLE steps (
    step INTEGER PRIMARY KEY, time REAL NOT NULL, scalars BLOB NOT NULL, statistics BLOB NOT NULL);
CREATE TABLE histograms (step INTEGER PRIMARY KEY, ordinal INTEGER NOT NULL, counts BLOB NOT NULL);
CREATE UNIQUE INDEX histograms_by_ordinal ON histograms (ordinal);
CREATE TABLE alerts (
    id INTEGER PRIMARY KEY, step INTEGER NOT NULL, until INTEGER, logged INTEGER NOT NULL,
    cause TEXT NOT NULL, severity TEXT NOT NULL, data TEXT NOT NULL);
CREATE TABLE events (
    id INTEGER PRIMARY KEY, step INTEGER NOT NULL, time REAL NOT NULL, kind TEXT NOT NULL,
    data TEXT NOT NULL);
CREATE INDEX events_by_kind ON events (kind, step);
CREATE INDEX events_by_step ON events (step);
CREATE TABLE pins (
    id INTEGER PRIMARY KEY, tensor INTEGER NOT NULL, position TEXT NOT NULL, since INTEGER NOT NULL,
    UNIQUE (tensor, position));
CREATE TABLE weights (
    pin INTEGER NOT NULL, step INTEGER NOT NULL, numbers BLOB NOT NULL,
    PRIMARY KEY (pin, step)) WITHOUT ROWID;
""" + "".join(
    f"""
CREATE TABLE rollup_{level} (
    key INTEGER PRIMARY KEY, rows INTEGER NOT NULL, cells BLOB NOT NULL, counts BLOB);
CREATE TABLE scalar_rollup_{level} (start INTEGER PRIMARY KEY, rows INTEGER NOT NULL, time REAL NOT NULL,
    cells BLOB NOT NULL);
"""
    for level in LEVELS
)

UPGRADES: dict[int, str] = {}
"""What turns a file of version n into version n + 1; run by a writer that goes on with the file."""

VIEWS: dict[int, str] = {}
"""Temporary views that show a file of version n as version n + 1; made by a reader, which never writes."""


def create(path: Path, identity: str) -> None:
    """Create an empty run file at `path`, which must not exist; it appears whole or not at all."""
    with whole_file(path) as partial:
        connection = connect(partial)
        try:
            connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
            connection.execute("BEGIN IMMEDIATE")
            _run(connection, TABLES)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.execute("INSERT INTO meta VALUES ('id', ?)", (f'"{identity}"',))
            connection.execute("INSERT INTO meta VALUES ('statistics', ?)", (json.dumps(STATISTICS),))
            connection.execute("COMMIT")
        finally:
            connection.close()


def connect(path: Path, *, mode: str = "rwc", wait: float = 5.0) -> sqlite3.Connection:
    """A connection that commits each statement outside BEGIN; in text, bytes not in UTF-8 are replaced."""
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=wait, isolation_level=None, check_same_thread=False)
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    return connection


def upgrade(connection: sqlite3.Connection, version: int) -> None:
    """Bring a file of an older version up to VERSION, whole or not at all."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        for older in range(version, VERSION):
            _run(connection, UPGRADES[older])
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def view_as_current(connection: sqlite3.Connection, version: int) -> None:
    for older in range(version, VERSION):
        _run(connection, VIEWS[older])


def _run(connection: sqlite3.Connection, script: str) -> None:
    """The statements of a script one by one: executescript would commit before it begins."""
    for statement in script.split(";"):
        if statement.strip():
            connection.execute(statement)
