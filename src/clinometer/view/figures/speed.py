"""Speeds and last values of a run, from its scalars."""

from __future__ import annotations

from typing import Any

import numpy as np

from clinometer.record.read.reader import RunFile

RECENT = 100
"""Steps over which a present value is averaged, and that a sparkline shows."""


def recent(run: RunFile, names: list[str], steps: int = RECENT) -> dict[str, np.ndarray]:
    """Each scalar over the last `steps` steps, with "step"; a name that was never recorded is left out."""
    known = set(run.scalar_names())
    last = run.info()["last_step"]
    wanted = [name for name in names if name in known]
    if last is None or not wanted:
        return {"step": np.zeros(0, dtype=np.int64)}
    found = run.scalars(wanted, first=max(0, last - steps + 1), last=last, points=steps)
    return {"step": found["step"], **{name: found[name]["mean"] for name in wanted}}


def newest(run: RunFile, name: str, steps: int = RECENT) -> tuple[float | None, int | None]:
    """The newest value of a scalar and, if that is not finite, the first step of the run where one was not.

    (None, None) where nothing was logged in the last `steps` steps.
    """
    last = run.info()["last_step"]
    if last is None or name not in run.scalar_names():
        return None, None
    found = run.scalars([name], first=max(0, last - steps + 1), last=last, points=steps)[name]
    values = found["mean"][found["count"] > 0]
    if not len(values):
        return None, None
    value = float(values[-1])
    return value, None if np.isfinite(value) else run.first_not_finite(name)


def rate(amount: np.ndarray | None, seconds: np.ndarray | None) -> float | None:
    """Σ amount / Σ seconds over the steps that have both."""
    if amount is None or seconds is None:
        return None
    both = np.isfinite(amount) & np.isfinite(seconds)
    total = float(seconds[both].sum())
    return float(amount[both].sum()) / total if total > 0 else None


def rates(amount: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """amount / seconds for each step, NaN where there is no time."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(seconds > 0, amount / seconds, np.nan)


def summary(found: dict[str, Any]) -> tuple[float | None, float | None]:
    """Tokens a second and steps a second."""
    seconds = found.get("seconds")
    steps = None if seconds is None else np.ones_like(seconds)
    return rate(found.get("tokens"), seconds), rate(steps, seconds)
