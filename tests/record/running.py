"""Small runs for the tests of this room."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np

from clinometer.record.write.recorder import Recorder

RUN = {
    "name": "small",
    "started": 1_790_000_000.0,
    "config": {"lr": 0.1},
    "environment": {"python": "3.12.0"},
    "statistics": ["grad_norm"],
    "every": 1,
    "model": "Tiny",
    "optimizers": ["SGD"],
}


def named(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "id": number,
            "name": f"layers.{number}.weight",
            "shape": [2, 3],
            "dtype": "float32",
            "numel": 6,
            "group": 0,
            "layer": number,
            "kind": "weight",
            "position": number,
        }
        for number in range(first, first + count)
    ]


def statistics(step: int, tensors: int) -> np.ndarray:
    """Different at each step and in each place; with NaN, infinity and zeros now and then."""
    values = np.random.default_rng(step).random((tensors, 8), dtype=np.float32)
    if tensors and step % 5 == 0:
        values[0, :4] = np.nan
    if tensors > 1 and step % 7 == 0:
        values[1, 0] = np.inf
    if tensors > 2:
        values[2, 6] = np.nan
    return values


def begun(folder: Path, tensors: int = 3, continue_from: int | None = None, **run: Any) -> Recorder:
    recorder = Recorder(folder, continue_from)
    recorder.begin({**RUN, **run})
    recorder.tensors(named(tensors))
    return recorder


def recorded(folder: Path, steps: int, tensors: int = 3, state: str = "done") -> Path:
    recorder = begun(folder, tensors)
    for step in range(1, steps + 1):
        recorder.step(step, 1e9 + step, {"loss": 10.0 / step}, statistics(step, tensors))
    recorder.close(state)
    return folder


def rows_of(folder: Path) -> dict[str, list[tuple]]:
    """Every row of every table, times of the clock and the process left out."""
    connection = sqlite3.connect(folder / "run.sqlite")
    try:
        tables = [
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        found = {
            table: connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in tables
        }
    finally:
        connection.close()
    found["meta"] = [row for row in found["meta"] if row[0] not in ("id", "since", "process", "state")]
    return found
