"""This module writes a file or a folder whole or not at all.

The new content lies under a temporary name beside the final one until its last byte is on the disk; the
rename is the commit. An exception removes the temporary file, and what was there before stays; a process that
is killed leaves only the temporary name, which no reader opens.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def temporary_name(path: Path) -> Path:
    """The name beside `path` under which this process writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path; the file that the block writes there becomes `path` when the block ends."""
    temporary = temporary_name(path)
    try:
        temporary.unlink(missing_ok=True)
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # the file is there; not every file system can sync a folder
        sync_folder(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file whole or not at all; text as UTF-8 with the system's line ends."""
    with whole_file(path) as temporary:
        if isinstance(content, bytes):
            with temporary.open("xb") as file:  # "x": never through a link that was put there
                file.write(content)
        else:
            with temporary.open("x", encoding="utf-8") as file:
                file.write(content)


def commit_folder(temporary: Path, final: Path, *, replace: bool = True) -> None:
    """Give the finished folder `temporary` its name; its files must be on the disk (`sync_file`).

    With `replace`, a folder of that name is renamed first, comes back if the commit fails, and is deleted
    last; without it, raises OSError if there is one.
    """
    sync_folder(temporary)
    old = None
    if replace and final.exists():
        old = temporary.with_name(f"{temporary.name}.old.tmp")
        final.rename(old)
    try:
        temporary.rename(final)
    except OSError:
        if old is not None:
            old.rename(final)
        raise
    sync_folder(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder if that is possible; renamed first, so that a kill never leaves half of it."""
    doomed = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    with suppress(OSError):
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Wait until the file's bytes are on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut (on Windows a folder cannot be opened for that)."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
