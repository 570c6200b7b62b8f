"""`clinometer runs` and `clinometer runs export`."""

from __future__ import annotations

import os
import unicodedata
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clinometer.messages import InputError, say
from clinometer.record.out.table_export import export
from clinometer.record.read.find_runs import find_runs
from clinometer.record.read.reader import RunFile

_COLOURS = {"live": "green", "failed": "red", "crashed": "red", "stopped": "yellow"}
LONGEST_NAME = 60


def runs_command(console: Console, folder: Path) -> int:
    """List the runs at or under `folder`, the newest first; returns the exit code."""
    if not os.path.isdir(folder):
        raise InputError("record.no_folder", path=folder)
    found = find_runs(folder)
    if not found:
        console.print(say("record.no_runs", folder=folder), markup=False, highlight=False)
        return 0
    table = Table(box=None, pad_edge=False)
    for column in ("name", "state", "steps", "loss", "alerts", "when"):
        right = column in ("steps", "loss", "alerts")
        table.add_column(say(f"record.column.{column}"), justify="right" if right else "left", no_wrap=right)
    broken = []
    for run in found:
        try:
            table.add_row(*_row(run, run.relative_to(folder) if run != folder else Path(run.name)))
        except InputError as error:
            broken.append(error)
            shown = Text(one_line(str(run.relative_to(folder))))
            table.add_row(shown, Text(say("record.state.unreadable"), "red"), "", "", "", "")
    console.print(table)
    for error in broken:
        console.print(str(error), markup=False, highlight=False, style="red")
    return 0


def export_command(
    console: Console,
    run: Path,
    to: Path,
    table: str = "steps",
    *,
    first: int | None = None,
    last: int | None = None,
    overwrite: bool = False,
) -> int:
    """Write one table of a run to `to` (.csv or .parquet); returns the exit code."""
    file = RunFile.open(run)
    try:
        rows = export(file, to, table, first, last, overwrite=overwrite)
    finally:
        file.close()
    console.print(say("record.exported", rows=rows, path=to), markup=False, highlight=False, soft_wrap=True)
    return 0


def one_line(text: str, most: int = LONGEST_NAME) -> str:
    """Text from a file as a terminal may show it: no line breaks, no control characters, not too long."""
    shown = "".join(c if unicodedata.category(c)[0] != "C" else "�" for c in text)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def _row(folder: Path, place: Path) -> tuple[Text, ...]:
    run = RunFile.open(folder)
    try:
        info = run.info()
        last = info["last_step"]
        loss = None if last is None else (run.row(last) or {"scalars": {}})["scalars"].get("loss")
    finally:
        run.close()
    name = one_line(str(place))
    if info["name"] not in (folder.name, ""):
        name = f"{name}  {one_line(info['name'])}"
    state = Text(say(f"record.state.{info['state']}"), _COLOURS.get(info["state"], ""))
    alerts = info["alert_count"]
    return (
        Text(name),
        state,
        Text("-" if last is None else f"{last:,}"),
        Text("-" if loss is None else f"{loss:.4g}"),
        Text(str(alerts) if alerts else "-", "yellow" if alerts else ""),
        Text(_when(info["updated"] or info["since"])),
    )


def _when(time: float | None) -> str:
    try:
        return "-" if time is None else datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError, TypeError):
        return "-"
