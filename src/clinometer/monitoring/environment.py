"""The environment of a run: versions, and the memory it uses."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable

import torch


def environment() -> dict[str, str]:
    """Versions and the machine, for the run's description."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _peak_of_process() -> Callable[[], float] | None:
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return lambda: float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


_host = _peak_of_process()


def memory_in_use(device: torch.device | None) -> float | None:
    """Peak bytes: of the process on the CPU, allocated on a GPU; None if unknown."""
    if device is not None and device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return _host() if _host is not None else None
