"""Finding the runs below a folder."""

from __future__ import annotations

import os
from pathlib import Path

from clinometer.record.format.schema import FILE_NAME

DEEPEST = 3
MOST_FOLDERS = 10_000
_NOT_RUNS = frozenset({"checkpoints", "replays", "samples", "tokenizer", "node_modules", "__pycache__"})


def find_runs(path: str | os.PathLike[str]) -> list[Path]:
    """The folders at or under `path`, at most three below it, that hold a run file; newest first."""
    found: list[tuple[float, Path]] = []
    level, looked_at = [Path(path)], 0
    for depth in range(DEEPEST + 1):
        below: list[Path] = []
        for folder in level:
            looked_at += 1
            if looked_at > MOST_FOLDERS:
                break
            when = _last_written(folder)
            if when is not None:
                found.append((when, folder))
            if depth < DEEPEST:
                below += _folders_in(folder)
        level = below
    return [folder for _, folder in sorted(found, key=lambda pair: (-pair[0], str(pair[1])))]


def _last_written(folder: Path) -> float | None:
    """When the run file, or the log beside it that takes the newest steps, was last written."""
    times = []
    for name in (FILE_NAME, f"{FILE_NAME}-wal"):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            if name == FILE_NAME:
                return None
    return max(times)


def _folders_in(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [
                Path(entry.path)
                for entry in entries
                if entry.name not in _NOT_RUNS and not entry.name.startswith(".") and entry.is_dir()
            ]
    except OSError:
        return []
