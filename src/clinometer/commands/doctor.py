"""What this machine offers, and what the defaults will use."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import distributed

from clinometer.distributed.launch import launched
from clinometer.messages import say
from clinometer.messages.folding import tell
from clinometer.torch_support import TESTED_PYTHON, TESTED_TORCH, is_tested, missing
from clinometer.training.run.run_folder import describe_environment
from clinometer.training.settings.precision import (
    bfloat16_is_fast,
    choose_device,
    copy_bandwidth,
    devices,
    find_compiler,
    matmul_rate,
    processor_name,
)


def doctor_command(console: Console) -> int:
    """Measure and print; always 0: a slow machine is not a fault."""
    environment = describe_environment()
    device = choose_device("auto")
    fast, why = bfloat16_is_fast(device)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))

    def row(key: str, value: str) -> None:
        table.add_row(say(f"doctor.{key}"), value)

    versions = environment["packages"]
    row(
        "version",
        f"clinometer {versions['clinometer']}, torch {torch.__version__}, Python {environment['python']}",
    )
    tested = {"torch": ", ".join(TESTED_TORCH), "python": ", ".join(TESTED_PYTHON)}
    row("tested", say("torch.tested", **tested, tested=1 if is_tested() else 0))
    for sentence in missing():
        row("missing", sentence)
    row("system", environment["platform"])
    row("processor", f"{processor_name()}, {environment['cores']}")
    row("threads", str(torch.get_num_threads()))
    row("memory", say("doctor.gigabytes", size=_memory_bytes() / 2**30))
    for place, path in (("disk_here", Path.cwd()), ("disk_temporary", Path(tempfile.gettempdir()))):
        row(place, say("doctor.gigabytes", size=shutil.disk_usage(path).free / 2**30))
    found = devices()
    for name, (here, what) in found.items():
        table.add_row(f"  {name}", f"{'✓' if here else '–'} {what}")
    row("auto", say("doctor.auto_takes", order=", ".join(found), device=device.type))
    backends = [
        name
        for name in ("gloo", "nccl")
        if distributed.is_available() and distributed.is_backend_available(name)
    ]
    launch = launched()
    together = (
        say("doctor.one_rank") if launch is None else say("doctor.of_ranks", **dataclasses.asdict(launch))
    )
    row("ranks", f"{together}; {', '.join(backends) or say('doctor.none')}")
    row("compiler", find_compiler(device) or say("doctor.none"))
    row("float32", f"{matmul_rate(device, 'float32') / 1e12:.2f} TFLOP/s")
    row("bfloat16", f"{matmul_rate(device, 'bfloat16') / 1e12:.2f} TFLOP/s ({why})")
    row("copy", f"{copy_bandwidth(device) / 1e9:.1f} GB/s")
    console.print(table)
    console.print()
    precision = "bfloat16" if fast else "float32"
    compiles = say("doctor.long_runs" if find_compiler(device) else "doctor.no_compiler")
    tell(console, say("doctor.defaults", device=device, precision=precision, why=why, compiles=compiles))
    return 0


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not on this system
        return 0
