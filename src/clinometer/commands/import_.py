"""`clinometer import`: makes a run of a Llama-type model that was trained elsewhere."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from clinometer.foreign_files import parse_json
from clinometer.lm.llama_files import CONFIG_FILE
from clinometer.messages import say
from clinometer.messages.folding import tell
from clinometer.training.run.load_run import import_run
from clinometer.training.settings.config import DataConfig, RunConfig


def import_command(console: Console, source: Path, run: Path, corpus: str) -> int:
    """Make a run of a Llama-type model that was trained elsewhere."""
    folder = import_run(source, run, RunConfig(data=DataConfig(corpus=corpus)))
    tell(console, say("cli.imported", path=folder.path))
    description = parse_json((source / CONFIG_FILE).read_text(encoding="utf-8"))
    heads = description["num_attention_heads"]
    groups = description.get("num_key_value_heads") or heads
    if groups != heads:
        tell(console, say("cli.imported_grouped", groups=groups, heads=heads), "yellow")
    if description.get("tie_word_embeddings"):
        tell(console, say("cli.imported_tied"), "yellow")
    return 0
