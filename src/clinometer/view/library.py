"""The runs under one folder, found and kept open for reading.

A URL carries a run's id, never a path: an id is looked up among the runs that were found.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinometer.messages import InputError
from clinometer.record.read.reader import RunFile, find_runs
from clinometer.view.errors import ApiError

MAX_RUNS = 200
MAX_OPEN = 64
RESCAN_SECONDS = 2.0
CLOSE_AFTER = 60.0
"""Seconds a file that fell out of use stays open: longer than any read of it may take."""

Inode = tuple[int, int]


@dataclass(frozen=True)
class Broken:
    """A folder whose run file cannot be read, and why."""

    folder: str
    error: InputError


class Library:
    """Thread-safe; a run has one open file, which its readers share, so that versions compare."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.summaries: dict[str, tuple[Any, dict[str, Any]]] = {}
        """By id: a version, and the run's summary at that version."""
        self._folders: dict[str, Path] = {}
        self._broken: list[Broken] = []
        self._ids: dict[Inode, str] = {}
        self._open: OrderedDict[Path, tuple[Inode, RunFile]] = OrderedDict()
        self._leaving: list[tuple[float, RunFile]] = []
        self._scanned = float("-inf")
        self._scan_lock = threading.Lock()
        self._lock = threading.Lock()

    def runs(self) -> Iterator[RunFile]:
        """The readable runs, newest first."""
        for identity in self.ids():
            with suppress(ApiError, InputError):
                yield self.open(identity)

    def ids(self) -> list[str]:
        self._scan(RESCAN_SECONDS)
        return list(self._folders)

    @property
    def broken(self) -> list[Broken]:
        return list(self._broken)

    def open(self, identity: str) -> RunFile:
        """The run with this id. Raises `ApiError` 404 if there is none, `InputError` if its file is torn."""
        folder = self._folders.get(identity)
        if folder is None:
            self._scan(RESCAN_SECONDS / 4)
            folder = self._folders.get(identity)
        run = None if folder is None else self._opened(folder)
        if run is None or run.id != identity:
            self._scanned = float("-inf")  # it moved or vanished: look again at the next call
            raise ApiError(404, "view.no_run", run=identity[:40])
        return run

    def name(self, folder: Path) -> str:
        """A folder as shown: relative to what was opened."""
        relative = os.path.relpath(folder, self.root)
        return self.root.resolve().name if relative == "." else relative

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            for _, run in [*self._open.values(), *self._leaving]:
                run.close()
            self._open.clear()
            self._leaving.clear()

    def _opened(self, folder: Path) -> RunFile | None:
        inode = _inode(folder)
        with self._lock:
            self._sweep()
            found = self._open.get(folder)
            if found is not None and found[0] == inode:
                self._open.move_to_end(folder)
                return found[1]
            if found is not None:  # it was deleted, or another run has its folder
                self._leave(folder)
            if inode is None:
                return None
            run = RunFile.open(folder)
            self._open[folder] = (inode, run)
            while len(self._open) > MAX_OPEN:
                self._leave(next(iter(self._open)))
            return run

    def _leave(self, folder: Path) -> None:
        self._leaving.append((time.monotonic(), self._open.pop(folder)[1]))

    def _sweep(self) -> None:
        while self._leaving and time.monotonic() - self._leaving[0][0] > CLOSE_AFTER:
            self._leaving.pop(0)[1].close()

    def _scan(self, max_age: float) -> None:
        with self._scan_lock:
            if time.monotonic() - self._scanned < max_age:
                return
            folders: dict[str, Path] = {}
            broken: list[Broken] = []
            in_use = set(self._folders.items())
            for folder in find_runs(self.root)[:MAX_RUNS]:
                try:
                    identity = self._id(folder)
                except InputError as error:
                    broken.append(Broken(self.name(folder), error))
                    continue
                if identity is not None and (identity not in folders or (identity, folder) in in_use):
                    folders[identity] = folder  # of two copies the newer one, unless the other is in use
            self._folders, self._broken = folders, broken
            self._scanned = time.monotonic()

    def _id(self, folder: Path) -> str | None:
        inode = _inode(folder)
        if inode is None:
            return None
        if inode not in self._ids:
            run = RunFile.open(folder)
            self._ids[inode] = run.id
            run.close()
        return self._ids[inode]


def _inode(folder: Path) -> Inode | None:
    try:
        stat = os.stat(folder / "run.sqlite")
    except OSError:
        return None
    return (stat.st_dev, stat.st_ino)
