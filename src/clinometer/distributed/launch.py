"""Whether a launcher started this process as one of several ranks that train together.

torchrun, or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, starts one process for each
device: a rank.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from clinometer.messages import InputError

OPENING_SECONDS = 300
"""Wait for the last rank to start: a large job does not begin on all machines at once."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the launcher tells this process."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    attempt: int = 0
    """How many times the launcher has restarted the ranks."""
    launcher_holds_board: bool = False

    @property
    def holds_board(self) -> bool:
        return self.rank == 0 and not self.launcher_holds_board


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """None for a single process. Raises `InputError` if the launcher's variables contradict each other."""
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
