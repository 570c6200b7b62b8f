"""`clinometer report`: writes a run as one HTML file."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from clinometer.messages import current_language, say
from clinometer.record.read.reader import RunFile
from clinometer.view.report import write_report


def report_command(console: Console, run: Path, to: Path) -> int:
    """Write a run's report; 0."""
    opened = RunFile.open(run)
    try:
        size = write_report(opened, to, current_language())
    finally:
        opened.close()
    said = say("view.report_written", path=to, size=f"{size / 1e6:.1f} MB")
    console.print(said, markup=False, highlight=False, soft_wrap=True)
    return 0
