"""Which process writes a run, so that a reader can tell a run that lives from one that died."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """Process id, when it started, and the machine it runs on."""
    return {"pid": os.getpid(), "started": _start_of(os.getpid()), "machine": _machine()}


def is_alive(process: dict[str, Any]) -> bool | None:
    """Whether that process still runs; None where this machine cannot know."""
    pid = process.get("pid")
    if process.get("machine") != _machine() or not isinstance(pid, int) or pid <= 0:
        return None
    if sys.platform == "linux":
        return _start_of(pid) == process.get("started")  # the number of a dead process is given away again
    if sys.platform == "win32":
        return None  # os.kill(pid, 0) would end it there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    except OverflowError:
        return False
    return True


def _machine() -> str:
    """Host name, its boot and its table of process ids: containers share the first and differ in the last."""
    parts = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        try:
            parts.append(read())
        except OSError:
            parts.append("")
    return "/".join(parts)


def _start_of(pid: int) -> int | None:
    """When a process began, in clock ticks after the boot; None if it has ended (or is a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
