"""Ranks of a test: processes forked from one that has imported torch, which every worker of pytest has."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

IMPORTED = [
    "hypothesis",
    "pytest",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "clinometer.gradients.diagnose.diagnose",
    "clinometer.monitoring.watch",
]
PATIENCE = timedelta(seconds=300)
"""Of a rank for the others: one that waits in vain fails, and on a busy machine none waits in vain."""


def run_ranks(rank: Callable[..., Any], *arguments: Any, count: int) -> None:
    """Call `rank(number, *arguments)` in `count` processes; raises what one of them raises."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    torch.multiprocessing.start_processes(rank, arguments, nprocs=count, start_method="forkserver")
