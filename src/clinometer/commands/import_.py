"""`clinometer import`: makes a run of a Llama-type model that was trained elsewhere."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from clinometer.messages import say
from clinometer.messages.folding import tell
from clinometer.training.run.load_run import import_run
from clinometer.training.settings.config import DataConfig, RunConfig


def import_command(console: Console, source: Path, run: Path, corpus: str) -> int:
    """Make a run of a Llama-type model that was trained elsewhere."""
    folder = import_run(source, run, RunConfig(data=DataConfig(corpus=corpus)))
    tell(console, say("cli.imported", path=folder.path))
    return 0
