"""`clinometer export`: writes a run's model as a folder that transformers opens."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from clinometer.lm.llama_files import export_llama
from clinometer.messages import say
from clinometer.messages.folding import tell
from clinometer.training.run.load_run import load_run


def export_command(console: Console, run: Path, to: Path, checkpoint: str, overwrite: bool) -> int:
    """Write a folder that transformers opens."""
    trained = load_run(run, checkpoint)
    eot = trained.tokenizer.end_of_text_id if trained.separated else None
    export_llama(
        trained.model,
        trained.model.config,
        to,
        end_of_text_id=eot,
        overwrite=overwrite,
        also=trained.tokenizer.save,
    )
    tell(console, say("cli.exported", path=to, step=trained.step))
    return 0
