"""What has become of a run, from what it wrote about itself and what this machine knows of its process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clinometer.record.format.process import is_alive

QUIET = 300.0
"""Seconds without a step after which a run on another machine counts as dead, unless it is that slow."""


def state_of(meta: dict[str, Any], times: Sequence[float], now: float) -> tuple[str, float | None]:
    """("live" | "done" | "stopped" | "failed" | "crashed" | "empty", since when).

    `times`: of the last steps, the newest first. A process that has ended without writing a state has
    crashed, since its last step; where its machine cannot be asked, it has if it is silent for 300 s and for
    20 of its steps.
    """
    written, since = meta.get("state"), meta.get("since")
    newest = times[0] if times else since
    if written in ("done", "stopped", "failed"):
        return written, since
    process = meta.get("process")
    alive = is_alive(process) if isinstance(process, dict) else False
    if alive is None and newest is not None:
        usual = (times[0] - times[-1]) / (len(times) - 1) if len(times) > 1 else 0.0
        alive = now - newest < max(QUIET, 20 * usual)
    if alive:
        return "live", since
    return ("crashed", newest) if times else ("empty", since)


def is_replayable(folder: Path) -> bool:
    """Whether the trainer left what a replay starts from: its settings and a checkpoint."""
    return (folder / "config.toml").is_file() and any((folder / "checkpoints").glob("step-*/state.json"))
