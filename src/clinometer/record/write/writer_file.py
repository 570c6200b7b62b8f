"""The file under a recorder: its lock, its journal, and the way back to it after an outage."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from clinometer.foreign_files import refuse_links
from clinometer.messages import InputError
from clinometer.record.format import schema
from clinometer.record.format.filesystem import is_network
from clinometer.record.format.open_run import damaged, open_for_writing
from clinometer.record.write.truncation import cut_after

_CHECKPOINT_PAGES = 4000
"""16 MB of WAL, about 1,500 steps of 300 tensors, between two syncs of the disk."""

LONGEST_LOG = 64 << 20
"""Bytes of WAL after which the writer waits for the readers of the moment, so that it can begin it again:
where reads overlap without a pause, none of SQLite's own checkpoints ever finds the moment to."""
LOOK_EVERY = 64
_WRITTEN = (schema.LOCK_NAME, *(schema.FILE_NAME + end for end in ("", "-wal", "-shm", "-journal")))
_LONGEST_WAIT = 200
"""Milliseconds for those readers; an answer takes less than 50."""


class WriterFile:
    """One writer's hold on RUN/run.sqlite."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / schema.FILE_NAME
        self._plain_path = os.fspath(self.path)
        """Looked at before every write, and a Path would be put together anew each time."""
        self.id = ""
        self.connection: sqlite3.Connection
        self._inode: tuple[int, int] | None = None
        self._looks = 0
        self._lock = FileLock(str(folder / schema.LOCK_NAME), thread_local=False)

    def open(self, continue_from: int | None) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            refuse_links(self.folder, _WRITTEN)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError("record.in_use", folder=self.folder) from None
        except (OSError, NotImplementedError) as error:
            raise InputError("record.not_writable", path=self.path, reason=_reason(error)) from None
        try:
            if continue_from is None:
                self._make_room()
            if continue_from is not None and self.path.exists() and self.path.stat().st_size:
                self._take(open_for_writing(self.path))
                cut_after(self.connection, continue_from)
            else:
                self.path.unlink(missing_ok=True)  # of 0 bytes, if it is there at all
                schema.create(self.path, uuid.uuid4().hex[:12])
                self._take(open_for_writing(self.path))
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise InputError("record.not_writable", path=self.path, reason=_reason(error)) from None
        except BaseException:
            self.close()
            raise

    def reopen(self) -> None:
        """Let go of the file and take hold of it again; raises OSError, sqlite3.Error or `InputError`."""
        with contextlib.suppress(sqlite3.Error):
            self.connection.close()
        known = self.id
        self._take(open_for_writing(self.path))
        if self.id != known:
            self.id = known
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))

    def execute(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        return self.connection.execute(statement, values)

    def begin(self) -> None:
        """Start a transaction, unless one has begun."""
        if not self.connection.in_transaction:
            self.connection.execute("BEGIN IMMEDIATE")

    def must_be_there(self) -> None:
        """Raise OSError if the path leads elsewhere now: SQLite would go on writing to nowhere."""
        found = os.stat(self._plain_path)
        if (found.st_dev, found.st_ino) != self._inode:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))

    def keep_log_short(self) -> None:
        """Now and then: begin the WAL again if it has grown long."""
        self._looks += 1
        if self._looks % LOOK_EVERY:
            return
        with contextlib.suppress(FileNotFoundError):
            if os.stat(f"{self.path}-wal").st_size > LONGEST_LOG:
                self.connection.execute(f"PRAGMA busy_timeout = {_LONGEST_WAIT}")
                self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                self.connection.execute("PRAGMA busy_timeout = 5000")

    def roll_back(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")

    def close(self) -> None:
        """Leave one plain file without a journal beside it, if no reader is in the way."""
        connection = getattr(self, "connection", None)
        if connection is not None:
            with contextlib.suppress(sqlite3.Error, OSError):
                self.must_be_there()
                connection.execute("PRAGMA busy_timeout = 100")
                connection.execute("PRAGMA journal_mode = DELETE")
            with contextlib.suppress(sqlite3.Error):
                connection.close()
        with contextlib.suppress(OSError):
            self._lock.release()

    def _make_room(self) -> None:
        """Remove the file of a start that died before its first step; `InputError` if there are steps."""
        if not self.path.exists():
            return
        if self.path.stat().st_size:
            connection = open_for_writing(self.path)
            try:
                (last,) = connection.execute("SELECT max(step) FROM steps").fetchone()
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise damaged(self.path, error) from None
            finally:
                connection.close()
            if last is not None:
                raise InputError("record.exists", folder=self.folder, last=last)
        for suffix in ("-wal", "-shm", "-journal", ""):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _take(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        if is_network(self.folder):
            connection.execute("PRAGMA journal_mode = TRUNCATE")
        else:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
            connection.execute(f"PRAGMA journal_size_limit = {LONGEST_LOG}")
        connection.execute("PRAGMA synchronous = NORMAL")
        (stored,) = connection.execute("SELECT value FROM meta WHERE key = 'id'").fetchone()
        self.id = stored.strip('"')
        found = os.stat(self.path)
        self._inode = (found.st_dev, found.st_ino)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
