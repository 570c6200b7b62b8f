"""Short texts that ranks leave for each other, by name, in a store of torch.distributed.

A text can be read at any time, also while the main thread waits in a collective. Texts are JSON; nothing is
pickled. The trainer's ranks open the launcher's TCPStore (`Board.open`); ranks that watch a sharded training
use the store of the process group that exists already (rendezvous.py).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from clinometer.distributed.launch import OPENING_SECONDS, Launch
from clinometer.messages import InputError


class Board:
    """Texts by name, under a prefix. Each thread needs its own (`again`): a store's connection answers one
    question at a time, and a question may wait."""

    def __init__(self, store: Any, prefix: str) -> None:
        from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]

        self._base, self._prefix = store, prefix
        self._store = PrefixStore(prefix, store)

    @classmethod
    def open(cls, launch: Launch, seconds: float = OPENING_SECONDS) -> Board:
        """Raises `InputError` if the launcher's address does not answer."""
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        try:
            if not launch.holds_board:
                _wait_for_answer(launch, seconds)
            store = TCPStore(
                launch.address,
                launch.port,
                launch.size,
                is_master=launch.holds_board,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
            )
        except (RuntimeError, OSError) as error:
            raise unreachable(launch, error) from None
        return cls(store, f"clinometer/{launch.attempt}")

    def again(self) -> Board:
        """The same board over a connection of its own."""
        return Board(self._base.clone(), self._prefix)

    def group_store(self) -> Any:
        """A part of the board for torch's own keys."""
        from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]

        return PrefixStore(f"{self._prefix}/torch", self._base.clone())

    def post(self, name: str, text: str) -> None:
        self._store.set(name, text)

    def remove(self, name: str) -> None:
        self._store.delete_key(name)

    def read(self, name: str) -> str | None:
        return self._store.get(name).decode() if self._store.check([name]) else None

    def read_all(self, names: list[str]) -> list[str]:
        """Texts that exist for certain, in one question."""
        return [text.decode() for text in self._store.multi_get(names)]

    def first(self, name: str, text: str) -> str:
        """Post the text unless another rank has; returns the one that stands there now."""
        return self._store.compare_set(name, "", text).decode()

    def absent(self, names: Sequence[str]) -> list[str]:
        """The names without a text."""
        return [name for name in names if not self._store.check([name])]

    def wait(self, names: Sequence[str], seconds: float) -> bool:
        """Whether all of them exist within that time."""
        # Asked again and again: torch's own wait writes warnings when the time is over.
        until, pause = time.monotonic() + seconds, 0.005
        while not self._store.check(list(names)):
            if time.monotonic() > until:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        return True


def unreachable(launch: Launch, error: Exception) -> InputError:
    """The error to raise if the board does not answer."""
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return InputError("parallel.unreachable", address=launch.address, port=launch.port, reason=reason)


def _wait_for_answer(launch: Launch, seconds: float) -> None:
    """Wait until the address answers; raises the last OSError. torch's own wait lasts twice as long, and ends
    with a page of C++ frames."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((launch.address, launch.port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
