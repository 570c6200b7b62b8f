"""Whether this process is one of several that train together, and the board where they leave words.

torchrun, or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, starts one process for each
device: a rank. The board is torch's TCPStore: short texts by name, which every rank can read at any time,
also while its main thread waits in a collective. Texts are JSON; nothing is pickled.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from clinometer.messages import InputError

OPENING_SECONDS = 300
"""For the last rank to be started: a large job does not begin on all machines at once."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the launcher says of this process."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    attempt: int = 0
    """How often the launcher has started the ranks again."""
    launcher_holds_board: bool = False

    @property
    def holds_board(self) -> bool:
        return self.rank == 0 and not self.launcher_holds_board


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """None for a process on its own. Raises `InputError` where a launcher's words contradict each other."""
    size, rank = environment.get("WORLD_SIZE", "1"), environment.get("RANK", "0")
    if not (size.isdecimal() and rank.isdecimal() and int(rank) < int(size)):
        raise InputError("parallel.launch", name="RANK, WORLD_SIZE", value=f"{rank}, {size}")
    if int(size) == 1:
        return None
    port = environment.get("MASTER_PORT", "")
    if not port.isdecimal() or not environment.get("MASTER_ADDR"):
        raise InputError(
            "parallel.launch",
            name="MASTER_ADDR, MASTER_PORT",
            value=f"{environment.get('MASTER_ADDR', '')}, {port}",
        )
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Launch(
        rank=int(rank),
        size=int(size),
        local_rank=int(environment.get("LOCAL_RANK", rank)),
        address=environment["MASTER_ADDR"],
        port=int(port),
        attempt=int(attempt) if attempt.isdecimal() else 0,
        launcher_holds_board=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def host_name() -> str:
    return socket.gethostname()


class Board:
    """Short texts by name. Each thread needs its own (`again`): a board's connection takes one question at a
    time, and a question may wait."""

    def __init__(self, store: Any, prefix: str) -> None:
        from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]

        self._base, self._prefix = store, prefix
        self._store = PrefixStore(prefix, store)

    @classmethod
    def open(cls, launch: Launch, seconds: float = OPENING_SECONDS) -> Board:
        """Raises `InputError` if no process answers at the launcher's address."""
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
        """A part of the board for torch's own words."""
        from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]

        return PrefixStore(f"{self._prefix}/torch", self._base.clone())

    def post(self, name: str, text: str) -> None:
        self._store.set(name, text)

    def read(self, name: str) -> str | None:
        return self._store.get(name).decode() if self._store.check([name]) else None

    def read_all(self, names: list[str]) -> list[str]:
        """Texts that are there for sure, in one question."""
        return [text.decode() for text in self._store.multi_get(names)]

    def first(self, name: str, text: str) -> str:
        """Posts it unless another rank has; returns what is posted now."""
        return self._store.compare_set(name, "", text).decode()

    def wait(self, names: list[str], seconds: float) -> bool:
        """Whether all of them are there within that time."""
        # Asked again and again: torch's own wait writes warnings of its own when the time is over.
        until, pause = time.monotonic() + seconds, 0.005
        while not self._store.check(names):
            if time.monotonic() > until:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        return True


def _wait_for_answer(launch: Launch, seconds: float) -> None:
    """Waits until a process listens there; raises the last OSError.

    torch's own wait lasts twice as long, and ends with a page of C++ frames.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((launch.address, launch.port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def unreachable(launch: Launch, error: Exception) -> InputError:
    """What to raise where the board does not answer."""
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return InputError("parallel.unreachable", address=launch.address, port=launch.port, reason=reason)
