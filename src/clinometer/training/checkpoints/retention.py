"""Which checkpoints of a run stay, and what an interrupted save or removal has left."""

from __future__ import annotations

import shutil
from pathlib import Path

from clinometer.training.checkpoints.checkpoint import checkpoints, step_of
from clinometer.whole_files import remove_folder


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one.

    What cannot be removed now stays for the next time. Step 0 stays: it is a model that was imported, and
    unlike first weights it cannot be drawn again.
    """
    for path in checkpoints(folder)[:-keep]:
        if step_of(path) not in (0, best_step):
            remove_folder(path)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that cannot be read, so that it is none any more; nothing of it is lost."""
    number = 1
    while (aside := path.with_name(f"damaged-{path.name}" + (f"-{number}" if number > 1 else ""))).exists():
        number += 1
    path.rename(aside)
    return aside


def sweep(folder: Path) -> None:
    """Remove what an interrupted save or removal has left: for the folder's trainer, before it trains.

    Not later: it may be writing one beside the training.
    """
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
