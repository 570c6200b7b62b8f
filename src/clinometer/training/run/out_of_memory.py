"""When memory runs out: which setting to lower, and to what."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path

import torch

from clinometer.messages import InputError
from clinometer.training.settings.config import RunConfig

BYTES_A_PARAMETER = 16
"""Weight, gradient and AdamW's two moments in float32."""
_MARGIN = 0.8
"""Of what would just fit: what fails is rarely the last thing that a step needs."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on the host, on a device, or in numpy."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("allocate memory", "out of memory")
    )


def too_little_memory(error: BaseException, config: RunConfig, parameters: int, device: str) -> InputError:
    """The error to raise instead of `error`: the largest micro-batch that should fit, or what else to lower.

    Of a step's memory the weights, gradients and moments do not depend on the batch; the rest grows with the
    micro-batch. If M of it were needed for m sequences, m·(limit − fixed)/M fit.
    """
    limit, taken = _limit_and_taken(device)
    asked = _asked(error)
    fixed = parameters * BYTES_A_PARAMETER
    now = config.micro_batch_size
    values = {"reason": error, "limit": _gib(limit), "fixed": _gib(fixed), "now": now}
    if fixed > _MARGIN * limit:
        return InputError("memory.model", **values, parameters=parameters)
    needed = max(taken + asked - fixed, asked, 1)
    if now == 1:
        return InputError("memory.context", **values, context=config.model.context_length // 2 or 1)
    most = min(now // 2, max(1, int(_MARGIN * now * (limit - fixed) / needed)))
    # It must divide the batch.
    fits = next(size for size in range(most, 0, -1) if config.training.batch_size % size == 0)
    return InputError("memory.batch", **values, fits=fits)


def _asked(error: BaseException) -> int:
    """Bytes of the allocation that failed, as the error tells them; 0 if it does not."""
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    if found := re.search(r"allocate (\d+) bytes", str(error)):
        return int(found[1])
    if found := re.search(r"allocate ([\d.]+) ([KMG]?)i?B", str(error)):
        return int(float(found[1]) * units[found[2]])
    return 0


def _limit_and_taken(device: str) -> tuple[int, int]:
    """Bytes available to this process, and its peak use in bytes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, torch.cuda.max_memory_allocated(device)
    limits, taken = [], 0
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # another system, or "max"
            continue
    try:
        text = Path("/proc/meminfo").read_text()
        limits += [int(n) * 1024 for n in re.findall(r"MemTotal:\s+(\d+) kB", text)]
    except OSError:
        pass
    with suppress(ImportError):  # Windows has none
        import resource

        for what in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
            soft = resource.getrlimit(what)[0]
            if soft != resource.RLIM_INFINITY:
                limits.append(soft)
        unit = 1 if sys.platform == "darwin" else 1024
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return min(limits, default=max(taken, 1)), taken


def _gib(size: int) -> float:
    return size / (1 << 30)
