"""A run as a table for pandas, polars or a spreadsheet: CSV, or Parquet with the extra `parquet`.

`steps`: one row a step, a column a scalar. `tensors`: one row a step and tensor, a column a statistic (tidy:
filter or pivot it). `alerts`, `events`, `weights`: one row each, what is nested as JSON. `time` is in UTC.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from clinometer.messages import InputError
from clinometer.record.format.schema import WEIGHT_FIELDS
from clinometer.record.read.reader import RunFile
from clinometer.whole_files import whole_file

TABLES = ("steps", "tensors", "alerts", "events", "weights")
_STEPS_AT_ONCE = 512

Columns = dict[str, list[Any]]


def export(
    run: RunFile,
    to: str | os.PathLike[str],
    table: str = "steps",
    first: int | None = None,
    last: int | None = None,
    *,
    overwrite: bool = False,
) -> int:
    """Write one table of a run to FILE.csv or FILE.parquet, whole or not at all, and return its rows.

    Raises `InputError`: another ending, another table, a file that is there already (unless `overwrite`), a
    place that cannot be written, pyarrow missing.
    """
    path = Path(to)
    if table not in TABLES:
        raise InputError("record.no_table", table=table, known=", ".join(TABLES))
    if path.suffix not in (".csv", ".parquet"):
        raise InputError("record.export_suffix", path=path)
    if path.exists() and (path.is_dir() or not overwrite):
        raise InputError("record.export_exists", path=path)
    write = _write_csv if path.suffix == ".csv" else _parquet_writer()
    try:
        with whole_file(path) as partial:
            rows = write(partial, table, _batches(run, table, first, last))
    except OSError as error:
        raise InputError("record.not_writable", path=path, reason=error.strerror or error) from None
    return rows


def _batches(run: RunFile, table: str, first: int | None, last: int | None) -> Iterator[Columns]:
    """Parts of a table, each read for itself: a live run is not held up. The first may have no rows."""
    if table in ("steps", "tensors"):
        names = run.scalar_names()
        tensors = [tensor["name"] for tensor in run.tensors()]
        statistics = run.info()["statistics"]
        while True:
            rows = run.rows(first, last, _STEPS_AT_ONCE)
            yield _steps(rows, names) if table == "steps" else _tensors(rows, tensors, statistics)
            if len(rows["step"]) < _STEPS_AT_ONCE:
                return
            first = int(rows["step"][-1]) + 1
    elif table == "alerts":
        keys = ("id", "cause", "severity", "step", "until", "tensors", "values")
        alerts = run.alerts(first, last, limit=1_000_000)
        yield {key: [_flat(alert.get(key)) for alert in alerts] for key in keys}
    elif table == "events":
        events = run.events(first=first, last=last, limit=1_000_000)
        columns: Columns = {key: [event[key] for event in events] for key in ("id", "step", "time", "kind")}
        columns["time"] = [_date(time) for time in columns["time"]]
        yield columns | {"data": [_flat(event["data"]) for event in events]}
    else:
        yield from _weights(run, first, last)


def _steps(rows: dict[str, Any], names: list[str]) -> Columns:
    columns: Columns = {"step": rows["step"].tolist(), "time": [_date(time) for time in rows["time"]]}
    for name in names:
        values, logged = rows["scalars"].get(name), rows["logged"].get(name)
        label = name if name not in ("step", "time") else f"{name}.logged"
        columns[label] = (
            [None] * len(columns["step"])
            if values is None
            else [value if there else None for value, there in zip(values.tolist(), logged, strict=True)]
        )
    return columns


def _tensors(rows: dict[str, Any], tensors: list[str], names: list[str]) -> Columns:
    statistics = rows["statistics"][:, : len(tensors)]
    columns: Columns = {
        "step": np.repeat(rows["step"], statistics.shape[1]).tolist(),
        "tensor": tensors[: statistics.shape[1]] * len(rows["step"]),
    }
    flat = statistics.reshape(-1, len(names))
    return columns | {name: list(flat[:, column]) for column, name in enumerate(names)}


def _weights(run: RunFile, first: int | None, last: int | None) -> Iterator[Columns]:
    names = {tensor["id"]: tensor["name"] for tensor in run.tensors()}
    yield {key: [] for key in ("step", "tensor", "index", *WEIGHT_FIELDS)}
    for pin in run.pinned():
        history = run.weight(pin["tensor"], pin["index"], first, last, points=1 << 40)
        count = len(history["step"])
        columns: Columns = {
            "step": history["step"].tolist(),
            "tensor": [names.get(pin["tensor"], str(pin["tensor"]))] * count,
            "index": [_flat(pin["index"])] * count,
        }
        yield columns | {field: history[field].tolist() for field in WEIGHT_FIELDS}


def _flat(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


def _date(time: float) -> datetime | None:
    try:
        return datetime.fromtimestamp(time, UTC)
    except (OverflowError, OSError, ValueError):
        return None


def _write_csv(path: Path, table: str, batches: Iterator[Columns]) -> int:
    """UTF-8; what was not logged is empty, NaN is `nan`."""
    rows = 0
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        for number, columns in enumerate(batches):
            if number == 0:
                writer.writerow(columns)
            columns = {name: [_shown(value) for value in column] for name, column in columns.items()}
            writer.writerows(zip(*columns.values(), strict=True))
            rows += len(columns["step"])
    return rows


def _shown(value: Any) -> Any:
    """float32 as short as tells it from its neighbours, dates in ISO 8601."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, np.floating):
        return "nan" if math.isnan(value) else str(value)
    return value


def _parquet_writer() -> Any:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise InputError("record.extra", package="pyarrow", extra="parquet") from None
    text, whole, exact = pa.string(), pa.int64(), pa.float64()
    names = pa.dictionary(pa.int32(), text)
    types = {"step": whole, "until": whole, "id": whole, "time": pa.timestamp("us", "UTC"), "tensor": names}
    types |= dict.fromkeys(("cause", "severity", "kind", "index", "data", "values", "tensors"), text)

    def kind_of(table: str, column: str) -> Any:
        if column in types and (table != "steps" or column in ("step", "time")):
            return types[column]
        return pa.float32() if table == "tensors" else exact

    def write(path: Path, table: str, batches: Iterator[Columns]) -> int:
        rows, writer = 0, None
        try:
            for columns in batches:
                schema = pa.schema([(name, kind_of(table, name)) for name in columns])
                writer = writer or parquet.ParquetWriter(path, schema, compression="zstd")
                writer.write_table(pa.table(columns, schema=schema))
                rows += len(columns["step"])
        finally:
            if writer is not None:
                writer.close()
        return rows

    return write
