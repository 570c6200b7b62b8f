"""metrics.jsonl and skipped.jsonl: rows that survive a full disk and can be cut back to a checkpoint."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


class JsonLines:
    """A file of JSON lines that grows, and can be cut back to the size that a checkpoint recorded.

    Without a path it writes nothing: of several ranks, rank 0 alone has one.
    """

    def __init__(self, path: Path | None, size: int | None = None) -> None:
        """Continue at byte `size` and drop what came later; None keeps the whole file.

        A file that is shorter was cut or removed: it goes on after its last whole row, and `lost` says how
        many bytes are missing. No number of the training depends on it.
        """
        self.trouble: OSError | None = None
        """Why rows wait in memory; None while each goes to the file at once."""
        self.lost = 0
        """Bytes that the file should hold at its beginning and does not."""
        self._waiting = bytearray()
        self._file = None
        if path is None:
            return
        found = path.stat().st_size if path.exists() else 0
        self._file = path.open("ab", buffering=0)
        if size is not None:
            whole = size if found >= size else path.read_bytes().rfind(b"\n") + 1
            self.lost = size - whole
            self._file.truncate(whole)

    def append(self, **row: Any) -> None:
        """Add a row. If the disk is full the row waits in memory until the disk takes it."""
        if self._file is None:
            return
        self._waiting += json.dumps(row, ensure_ascii=False).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            self.trouble = error

    def _write(self) -> None:
        while self._file is not None and self._waiting:
            del self._waiting[: self._file.write(self._waiting)]
        self.trouble = None

    @property
    def size(self) -> int:
        return 0 if self._file is None else os.fstat(self._file.fileno()).st_size

    @property
    def vanished(self) -> bool:
        """Whether the file was deleted while it is open: what is written is lost."""
        return self._file is not None and os.fstat(self._file.fileno()).st_nlink == 0

    def sync(self) -> None:
        """Wait until every row is on the disk. Raises OSError if it does not take them."""
        self._write()
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):
            self._write()
        if self._file is not None:
            self._file.close()
