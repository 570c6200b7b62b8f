"""Settings that the C library and OpenMP read at the start of a process; a command that computes restarts."""

from __future__ import annotations

import os
import sys

PROCESS_SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(64 << 30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "GOMP_SPINCOUNT": "1000",
}
"""glibc returns large blocks to the system and pays for fresh pages at every step; if it keeps them, training
on a CPU is a fifth to two fifths faster. OpenMP's threads spin while they wait for each other; spinning
briefly costs nothing on an idle machine and doubles the speed where another program needs a core
(docs/log.md)."""


def restart_with_settings() -> None:
    """Start this process again with PROCESS_SETTINGS; those that the user has set stay as they are."""
    if sys.platform != "linux" or "LD_PRELOAD" in os.environ:  # a preloaded allocator has its own settings
        return
    missing = {name: value for name, value in PROCESS_SETTINGS.items() if name not in os.environ}
    if missing:
        os.environ.update(missing)
        os.execv(sys.executable, [sys.executable, "-m", "clinometer", *sys.argv[1:]])
