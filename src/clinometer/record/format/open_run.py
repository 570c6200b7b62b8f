"""Opening a file that may be a run: what it must have, and the errors if it does not."""

from __future__ import annotations

import os
import sqlite3
import stat
from pathlib import Path

from clinometer.messages import InputError
from clinometer.record.format import schema

_MOST_BYTES = 1 << 30
"""No text or blob of a run file is longer; a damaged length must not ask for more memory than there is."""

_PROGRAMS = (
    "SELECT count(*) FROM sqlite_master WHERE type NOT IN ('table', 'index') OR rootpage = 0",
    "SELECT count(*) FROM sqlite_master AS t JOIN pragma_table_xinfo(t.name) AS c"
    " WHERE t.type = 'table' AND c.hidden <> 0",
    "SELECT count(*) FROM sqlite_master AS t JOIN pragma_index_xinfo(t.name) AS c"
    " WHERE t.type = 'index' AND c.cid = -2",
    "SELECT count(*) FROM sqlite_master"
    " WHERE sql LIKE '%CHECK%' OR sql LIKE '%DEFAULT%' OR sql LIKE '%WHERE%'",
)
"""What our files do not have, and what a stranger's could run by: views and triggers, virtual tables, columns
computed when they are read (zeroblob(10⁹) is a gigabyte from twelve bytes), indices of expressions or with a
condition, checks, defaults."""


def open_for_reading(path: Path) -> sqlite3.Connection:
    """A connection that cannot write. Raises `InputError`: no run file, a newer one, a damaged one."""
    _must_be_a_file(path)
    try:
        connection = schema.connect(path, mode="ro")
        try:
            version = _check(connection, path)
        except sqlite3.OperationalError as error:
            # A folder that cannot be written has no place for WAL's shared memory. Where no WAL is left
            # no process writes either, and the file can be read as it is.
            connection.close()
            wal = path.with_name(path.name + "-wal")
            if _is_busy(error) or os.access(path.parent, os.W_OK) or (wal.exists() and wal.stat().st_size):
                raise
            connection = schema.connect(path, mode="ro&immutable=1")
            version = _check(connection, path)
        try:
            if version < schema.VERSION:
                schema.view_as_current(connection, version)
        except BaseException:
            connection.close()
            raise
    except (sqlite3.Error, UnicodeDecodeError) as error:  # the second: of a name in SQLite's own message
        raise damaged(path, error) from None
    return connection


def open_for_writing(path: Path) -> sqlite3.Connection:
    """A connection to a file that is there, brought up to this version. Raises as `open_for_reading` does."""
    _must_be_a_file(path)
    try:
        connection = schema.connect(path, mode="rw")
        version = _check(connection, path)
        if version < schema.VERSION:
            schema.upgrade(connection, version)
    except (sqlite3.Error, UnicodeDecodeError) as error:  # the second: of a name in SQLite's own message
        raise damaged(path, error) from None
    return connection


def damaged(path: Path, error: Exception) -> InputError:
    if isinstance(error, sqlite3.OperationalError) and _is_busy(error):
        return InputError("record.busy", path=path)
    if isinstance(error, sqlite3.OperationalError) and "unable to open" in str(error):
        return InputError("record.cannot_open", path=path, reason=error)
    if isinstance(error, sqlite3.DatabaseError) and "not a database" in str(error):
        return InputError("record.not_a_run_file", path=path)
    return InputError("record.damaged", path=path, reason=str(error) or type(error).__name__)


def _must_be_a_file(path: Path) -> None:
    """One look only: between two of them a run may begin."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if not path.parent.exists():
            raise InputError("record.no_folder", path=path.parent) from None
        raise InputError("record.missing", path=path) from None
    except OSError as error:
        raise InputError("record.cannot_open", path=path, reason=error.strerror) from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError("record.not_a_run_file", path=path)
    if found.st_size == 0:
        raise InputError("record.empty", path=path)


def _check(connection: sqlite3.Connection, path: Path) -> int:
    """The file's version, once it is known to be a run file of a version that can be read."""
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MOST_BYTES)
    connection.execute("PRAGMA cache_size = -65536")
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != schema.APPLICATION_ID:
        connection.close()
        raise InputError("record.not_a_run_file", path=path)
    if version > schema.VERSION:
        connection.close()
        raise InputError("record.newer", path=path, found=version, known=schema.VERSION)
    if version < 1 or any(connection.execute(query).fetchone()[0] for query in _PROGRAMS):
        connection.close()
        raise InputError("record.not_a_run_file", path=path)
    return version


def _is_busy(error: sqlite3.Error) -> bool:
    return "locked" in str(error) or "busy" in str(error)
