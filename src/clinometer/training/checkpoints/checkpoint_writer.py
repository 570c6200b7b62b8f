"""Writes checkpoints: by one process or by all ranks, at once or in a thread beside the training.

Several ranks write one folder under a temporary name, each its files; rank 0 waits until every rank has
said that its files are on the disk, writes state.json and renames the folder. What they say to each other
stands on the board, so a thread can do all of it while the ranks compute. One checkpoint is under way at a
time.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from clinometer.distributed.board import Board
from clinometer.distributed.launch import host_name
from clinometer.messages import InputError
from clinometer.training.checkpoints import checkpoint
from clinometer.training.checkpoints.checkpoint import Snapshot
from clinometer.training.ranks.world import Ended, World
from clinometer.whole_files import temporary_name


class CheckpointWriter:
    """Writes checkpoints into `folder`, one after the other."""

    def __init__(self, folder: Path, world: World) -> None:
        self._folder, self._world = folder, world
        self._board: Board | None = None
        self._under_way: _WriteThread | None = None

    def save(self, snapshot: Snapshot) -> Path:
        """Write it now. Raises `InputError` if it cannot be written, on every rank the same."""
        self.written(wait=True)
        if self._world.alone:
            return checkpoint.write_checkpoint(self._folder, snapshot)
        name = self._world.turn()
        with self._world.unhurried():
            return write_together(self._folder, snapshot, self._world, self._world.board, name)

    def begin(self, snapshot: Snapshot) -> None:
        """Write a copy of it in a thread. The one before must have been waited for: `written(wait=True)`."""
        assert self._under_way is None
        kept = snapshot.copied()
        name = self._world.turn()
        if self._world.alone:
            self._under_way = _WriteThread(lambda: checkpoint.write_checkpoint(self._folder, kept))
        else:
            board = self._board = self._board or self._world.board.again()
            self._under_way = _WriteThread(
                lambda: write_together(self._folder, kept, self._world, board, name)
            )

    def written(self, wait: bool = False) -> Path | None:
        """The checkpoint that was begun, once it is written; None before, and after it was returned.

        Raises `InputError` if it could not be written.
        """
        beside = self._under_way
        if beside is None:
            return None
        if wait:
            with self._world.unhurried():
                beside.join()
        elif beside.is_alive():
            return None
        self._under_way = None
        return beside.result()


class _WriteThread(threading.Thread):
    """A write in a thread of its own."""

    def __init__(self, write: Any) -> None:
        super().__init__(name="clinometer checkpoint", daemon=False)
        self._write = write
        self._path: Path | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._path = self._write()
        except BaseException as error:
            self._error = error

    def result(self) -> Path | None:
        if self._error is not None:
            raise self._error
        return self._path


def write_together(folder: Path, snapshot: Snapshot, world: World, board: Board, name: str) -> Path:
    """This rank's part in writing `folder/step-…`; returns when the whole is there.

    Raises `InputError` on every rank if one could not write, and `Ended` if one is lost.
    """
    final = folder / snapshot.folder_name
    if world.first:
        board.post(f"{name}/outcome", json.dumps(_lead(final, snapshot, world, board, name)))
    else:
        _wait(board, [f"{name}/folder"])
        partial = folder / (board.read(f"{name}/folder") or "")
        if partial != folder:
            board.post(f"{name}/{world.rank}", json.dumps(_report(partial, snapshot)))
        _wait(board, [f"{name}/outcome"])
    outcome = json.loads(board.read(f"{name}/outcome") or "{}")
    if outcome:
        values = outcome["values"]
        raise InputError(outcome["key"], **values)
    return final


def _lead(final: Path, snapshot: Snapshot, world: World, board: Board, name: str) -> dict[str, Any]:
    """Make the folder, gather the ranks' reports, and commit; returns the error, or {}."""
    partial = temporary_name(final)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
    except OSError as error:
        board.post(f"{name}/folder", "")
        return _failure(final, error)
    board.post(f"{name}/folder", partial.name)
    try:
        reports = [_report(partial, snapshot)]
        names = [f"{name}/{rank}" for rank in range(1, world.size)]
        _wait(board, names)
        reports += map(json.loads, board.read_all(names))
        for report in reports:
            if "key" in report:
                return report
        checkpoint.commit(
            final, partial, snapshot, {n: told for report in reports for n, told in report.items()}
        )
        return {}
    except (OSError, SafetensorError) as error:
        return _failure(final, error)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _report(partial: Path, snapshot: Snapshot) -> dict[str, Any]:
    """Write this rank's files; their fingerprints, or what went wrong."""
    if not partial.is_dir():
        values = {"path": str(partial.parent), "host": host_name()}
        return {"key": "parallel.not_shared", "values": values}
    try:
        return checkpoint.write_files(partial, snapshot)
    except (OSError, SafetensorError) as error:
        return _failure(partial.parent / snapshot.folder_name, error)


def _failure(final: Path, error: Exception) -> dict[str, Any]:
    values = {"path": str(final), "reason": checkpoint.reason_of(error)}
    return {"key": "checkpoint.not_written", "values": values}


def _wait(board: Board, names: list[str]) -> None:
    while not board.wait(names, 1.0):
        if board.read("verdict") is not None:
            raise Ended
