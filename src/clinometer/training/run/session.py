"""A run in memory: its computation, its files, and its checkpoints; and how it can end."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from clinometer.messages import InputError
from clinometer.training.checkpoints import checkpoint, retention
from clinometer.training.checkpoints.checkpoint_writer import CheckpointWriter
from clinometer.training.run.computation import Computation
from clinometer.training.run.finite_checks import NotFinite, first_spoilt
from clinometer.training.run.json_lines import JsonLines
from clinometer.training.run.run_folder import RunFolder


class Display(Protocol):
    """Receives what the loop reports (display.py shows it on a terminal or as plain lines)."""

    def step(self, row: dict[str, Any]) -> None: ...
    def validation(self, step: int, loss: float, best: bool) -> None: ...
    def sample(self, step: int, text: str) -> None: ...
    def notice(self, key: str, /, **values: Any) -> None: ...


class Outcome(Enum):
    """How a run ended, and the exit code."""

    DONE = 0
    NOT_FINITE = 1
    INTERRUPTED = 130
    TERMINATED = 143


@dataclass(kw_only=True)
class TrainingSession(Computation):
    """A run in memory, with the folder it is written to."""

    folder: RunFolder
    metrics: JsonLines
    skipped: JsonLines
    skipped_in_a_row: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    spoilt: bool = False
    """Whether it ended because a weight or a moment is not finite."""

    def checkpoint(self, *, must: bool = False) -> Path | None:
        """Write everything that the run needs to continue bit for bit.

        With `training.async_checkpoints` the write only begins here (`written` returns it), unless `must`.
        Raises `NotFinite`, and writes nothing, if a weight or a moment is not a finite number.
        """
        self.must_be_there()
        self.must_be_finite()
        self._sync_rows()
        more = {
            "config": self.config.to_dict(),
            "model": dataclasses.asdict(self.model.config),
            "choices": dataclasses.asdict(self.choices),
            "data": {"content": self.data.header.content_hash, "tokenizer": self.tokenizer.hash},
            "separated": self.data.header.documents > 1,
            "metrics_bytes": self.metrics.size,
            "skipped_bytes": self.skipped.size,
            "skipped_in_a_row": self.skipped_in_a_row,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
        }
        beside = self.config.training.async_checkpoints and not must
        if self.world.alone and not beside:
            path = checkpoint.save_checkpoint(
                self.folder.checkpoints, self.step, self.model, self.optimizers, more
            )
            return self._pruned(path)
        snapshot = checkpoint.take_snapshot(
            self.step, self.model, self.optimizers, more, rank=self.world.rank, size=self.world.size
        )
        if beside:
            # What was there before is pruned first: afterwards a half-written one is no leftover.
            before = self.written(wait=True)
            self._saver.begin(snapshot)
            return before
        return self._pruned(self._saver.save(snapshot))

    def _sync_rows(self) -> None:
        """A checkpoint records how many rows there are; all ranks raise if rank 0 cannot write its rows."""
        reason = ""
        try:
            self.metrics.sync()
            self.skipped.sync()
        except OSError as error:
            reason = checkpoint.reason_of(error)
        if self.world.sum([float(bool(reason))])[0]:
            name = self.folder.checkpoints / f"step-{self.step:08d}"
            raise InputError("checkpoint.not_written", path=name, reason=reason)

    def written(self, wait: bool = False) -> Path | None:
        """The checkpoint that was begun, when it is there. Raises `InputError` if it could not be written."""
        return self._pruned(self._saver.written(wait))

    def _pruned(self, path: Path | None) -> Path | None:
        if path is not None and self.world.first:
            retention.prune(self.folder.checkpoints, self.config.training.keep, self.best_step)
        return path

    def __post_init__(self) -> None:
        self._saver = CheckpointWriter(self.folder.checkpoints, self.world)

    def must_be_there(self) -> None:
        """Raise `InputError` if the run folder was deleted or replaced under us."""
        if self.metrics.vanished or not self.folder.config_file.exists():
            raise InputError("run.vanished", path=self.folder.path, step=self.step)

    def must_be_finite(self) -> None:
        """Raise `NotFinite`, with the checkpoint to resume from, if a weight or a moment is not finite.

        Of several ranks every one calls, and every one raises.
        """
        spoilt = first_spoilt(self.model.named_parameters(), self.optimizers, self.world)
        if spoilt is None:
            return
        if not self.world.alone or self.config.training.async_checkpoints:
            with suppress(InputError):  # one in writing is good: resume from it
                self.written(wait=True)
        saved = checkpoint.checkpoints(self.folder.checkpoints)
        if spoilt.key:
            key = "train.spoilt_moment" if saved else "train.spoilt_moment_from_start"
        else:
            key = "train.spoilt_weight" if saved else "train.spoilt_weight_from_start"
        values = {"step": self.step, "tensor": spoilt.described, "run": self.folder.path}
        if saved:
            values |= {"path": saved[-1], "good": checkpoint.step_of(saved[-1])}
        raise NotFinite(key, **values)

    def close(self) -> None:
        with suppress(BaseException):  # reported already, or the run has ended by something worse
            self._saver.written(wait=True)
        self.metrics.close()
        self.skipped.close()
        self.folder.unlock()
