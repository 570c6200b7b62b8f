"""What a recorded step costs, and what a page's questions cost: `python -m benchmarks.recording [--full]`.

Writing: steps of 300 tensors × 8 statistics and 10 scalars, each committed, in turns with two peers on the
same numbers: a bare SQLite insert of the same row without roll-ups, and a row a tensor (the plain layout).
Reading: a synthetic run (10,000 steps; 100,000 with --full), each call on a fresh connection and again. Wall
times, and the process's own CPU time, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tests.record.synthetic import KINDS, synthetic, tensor_list

from benchmarks import rows as kept_rows
from benchmarks.optimizer import machine
from clinometer.record.read.reader import RunFile
from clinometer.record.write.recorder import Recorder

NAMES = ("loss", "lr", "total_norm", "clip", "max_norm", "tokens", "seconds", "memory", "taken", "grad_scale")
SCALARS = dict.fromkeys(NAMES, 0.5)


def bare(path: Path, statement: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(statement)
    return connection


def writing(steps: int) -> dict[str, list[float]]:
    """Seconds of each step of each contender."""
    tensors = tensor_list(43)[:300]
    rows = np.random.default_rng(0).random((64, len(tensors), 8), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(Path(folder) / "run")
        recorder.begin({"name": "benchmark"})
        recorder.tensors(tensors)
        one = bare(
            Path(folder) / "one", "CREATE TABLE steps (step INTEGER PRIMARY KEY, time, scalars, statistics)"
        )
        many = bare(Path(folder) / "many", "CREATE TABLE cells (step, tensor, a, b, c, d, e, f, g, h)")

        def row_a_tensor(step: int) -> None:
            many.execute("BEGIN")
            many.executemany(
                "INSERT INTO cells VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [(step, i, *row) for i, row in enumerate(rows[step % 64].tolist())],
            )
            many.execute("COMMIT")

        contenders: dict[str, Callable[[int], object]] = {
            "Recorder.step": lambda step: recorder.step(step, 1e9 + step, SCALARS, rows[step % 64]),
            "one bare insert": lambda step: one.execute(
                "INSERT INTO steps VALUES (?, ?, ?, ?)", (step, 1e9 + step, b"0" * 80, rows[step % 64])
            ),
            "a row a tensor": row_a_tensor,
        }
        wall: dict[str, list[float]] = {name: [] for name in contenders}
        cpu: dict[str, list[float]] = {name: [] for name in contenders}
        for step in range(steps):
            for name, call in contenders.items():
                if name == "a row a tensor" and step % 10:
                    continue
                begin, begin_cpu = time.perf_counter(), time.thread_time()
                call(step)
                cpu[name].append(time.thread_time() - begin_cpu)
                wall[name].append(time.perf_counter() - begin)
        recorder.close()
    print(f"{'µs a step (300 tensors × 8)':<30}{'p50':>8}{'p99':>8}{'mean':>8}{'CPU p50':>9}{'CPU mean':>9}")
    for name in contenders:
        p50, p99 = np.percentile(wall[name], [50, 99]) * 1e6
        mean, busy = np.mean(wall[name]) * 1e6, np.array(cpu[name]) * 1e6
        print(f"{name:<30}{p50:>8.0f}{p99:>8.0f}{mean:>8.0f}{np.median(busy):>9.0f}{busy.mean():>9.0f}")
    return wall


def questions(run: RunFile, steps: int) -> dict[str, Callable[[], object]]:
    tensors = [tensor["id"] for tensor in run.tensors()]
    half = steps // 2
    return {
        "info": run.info,
        "version": run.version,
        "tensors": run.tensors,
        "scalars, 5 names": lambda: run.scalars(["loss", "lr", "total_norm", "validation_loss", "time"]),
        "scalars, a fifth": lambda: run.scalars(["loss"], half, half + steps // 5),
        "series, 1 tensor": lambda: run.series([3], "grad_norm"),
        "series, 1 tensor, ratio": lambda: run.series([3], "update_ratio"),
        "series, all tensors, 100 points": lambda: run.series(tensors, "grad_norm", points=100),
        "series, 2,000 steps": lambda: run.series([3], "grad_norm", half, half + 1999),
        "map": lambda: run.grid("grad_norm"),
        "map, ratio": lambda: run.grid("update_ratio"),
        "map, a fifth": lambda: run.grid("grad_rms", half, half + steps // 5),
        "map, 1,280 steps": lambda: run.grid("grad_norm", half, half + 1279),
        "map, 2,500 steps": lambda: run.grid("grad_norm", half, half + 2499),
        "row": lambda: run.row(half),
        "histograms": lambda: run.histograms(7, "grad"),
        "alerts": run.alerts,
        "events": run.events,
        "weight": lambda: run.weight(1, [3, 5]),
    }


def reading(folder: Path, steps: int) -> list[tuple[str, float, float, float]]:
    """(question, ms on a fresh connection, median ms again, median CPU ms again) for each question."""
    found = []
    known = RunFile.open(folder)
    for name in questions(known, steps):
        run = RunFile.open(folder)
        call = questions(run, steps)[name]
        times, busy = [], []
        for _ in range(6):
            begin, begin_cpu = time.perf_counter(), time.process_time()
            call()
            busy.append((time.process_time() - begin_cpu) * 1e3)
            times.append((time.perf_counter() - begin) * 1e3)
        run.close()
        found.append((name, times[0], float(np.median(times[1:])), float(np.median(busy[1:]))))
    known.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="read a run of 100,000 steps (1.3 GB)")
    parser.add_argument("--steps", type=int, default=4000, help="steps to write")
    kept_rows.options(parser)
    given = parser.parse_args()
    print(machine())
    wall = writing(given.steps)
    ours, bare_insert = ([1e6 * s for s in wall[name]] for name in ("Recorder.step", "one bare insert"))
    kept_rows.keep(given.json, [kept_rows.paired("record", "one bare insert", ours, bare_insert, "µs")])
    steps = 100_000 if given.full else 10_000
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        synthetic(Path(folder), steps, layers=42)
        seconds, size = time.perf_counter() - begin, (Path(folder) / "run.sqlite").stat().st_size
        tensors = 2 + 42 * len(KINDS)
        print(f"\n{steps:,} steps × {tensors} tensors: {size / 1e6:,.0f} MB, made in {seconds:.1f} s")
        print(f"{'ms a question':<34}{'first':>9}{'again':>9}{'CPU':>9}")
        for name, first, again, busy in reading(Path(folder), steps):
            print(f"{name:<34}{first:>9.2f}{again:>9.2f}{busy:>9.2f}")


if __name__ == "__main__":
    main()
