"""The run file of a training: every tensor at every step, and the events."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients.report.result import Result
from clinometer.messages import InputError
from clinometer.monitoring.alert_diagnosis import report_data
from clinometer.monitoring.alerts.alerts import render
from clinometer.monitoring.watch import Watch, watch
from clinometer.record.format.schema import FILE_NAME
from clinometer.record.read.reader import RunFile
from clinometer.record.write.recorder import Recorder
from clinometer.training.run.computation import batch_of
from clinometer.training.run.session import Display, Outcome, TrainingSession

PINNED = ("attn.q_proj", "attn.v_proj", "attn.output_proj", "ffn.w1", "ffn.w2")
"""Of the middle layer: weights whose every step is written down in full, so that there is one to look at."""

_STATES = {
    Outcome.DONE: "done",
    Outcome.NOT_FINITE: "failed",
    Outcome.INTERRUPTED: "stopped",
    Outcome.TERMINATED: "stopped",
}


def open_record(session: TrainingSession, display: Display) -> RunRecord:
    """The run's record, cut back to the session's step; a silent one if it is off or cannot be opened.

    A training does not fail if it cannot be recorded: the display shows the reason. On several ranks
    every one watches, for what is measured is added up over them, and rank 0 writes.
    """
    if not session.config.training.watch_every:
        return RunRecord()
    world, recorder = session.world, None
    if world.first:
        there = (session.folder.path / FILE_NAME).exists()
        try:
            recorder = Recorder(session.folder.path, continue_from=session.step if there else None)
        except InputError as error:
            display.notice("train.unrecorded", reason=str(error))
    if not world.share(recorder is not None):
        return RunRecord()
    try:
        return RunRecord(session, _watch(session, display, [] if recorder is None else [recorder]))
    except InputError as error:  # found by every rank
        if recorder is not None:
            recorder.close(None)
        display.notice("train.unrecorded", reason=str(error))
        return RunRecord()


class RunRecord:
    """Writes what the loop reports into RUN/run.sqlite, beside the measurements of the watch, if any."""

    def __init__(self, session: TrainingSession | None = None, watch: Watch | None = None) -> None:
        self._session, self.watch = session, watch

    def before_step(self, loss: float, norm: float, taken: bool) -> None:
        if self.watch is None or self._session is None:
            return
        config = self._session.config
        self.watch.log(loss=loss, tokens=config.training.batch_size * config.model.context_length)
        self.watch.batch({"step": self._session.step + 1, "seed": config.training.seed})
        if not taken:
            self.watch.skip()

    def step(self) -> None:
        if self.watch is not None:
            self.watch.flush()

    def event(self, kind: str, **values: Any) -> None:
        """Something that happened: a validation, a sample, a checkpoint."""
        if self.watch is not None:
            self.watch.event(kind, **values)

    def close(self, outcome: Outcome | None) -> None:
        if self.watch is not None:
            self.watch.close("failed" if outcome is None else _STATES[outcome])


def _watch(session: TrainingSession, display: Display, sinks: list[Recorder]) -> Watch:
    """The watch of a session, with its pins; it shows each alert once, when it opens."""
    config, shown = session.config, set[int]()

    def show(alert: dict[str, Any]) -> None:
        if alert["until"] is None and alert["id"] not in shown:
            shown.add(alert["id"])
            display.notice("train.alert", text=render(alert))

    watched = watch(
        session.model,
        session.optimizers,
        sinks,
        every=config.training.watch_every,
        name=session.folder.path.name,
        config=config.to_dict(),
    )
    watched.step = session.step
    watched.on_alert = show
    if session.world.alone:
        watched.closure = lambda: _loss_in_hand(session)
    layer = config.model.num_layers // 2
    for kind in PINNED:
        watched.pin(f"layers.{layer}.{kind}.weight", (0, 0))
    if session.step:
        watched.event("resumed", step=session.step)
    return watched


def _loss_in_hand(session: TrainingSession) -> Tensor:
    """The loss of the step in hand, for a diagnosis: of its first micro-batch that is not finite."""
    size = session.config.micro_batch_size
    token_ids, targets = batch_of(session, session.step)
    parts = list(zip(token_ids.split(size), targets.split(size), strict=True))
    with session.choices.autocast():
        for part in parts[:-1]:
            with torch.no_grad():
                finite = bool(torch.isfinite(session.model.loss(*part)))
            if not finite:
                return session.model.loss(*part)
        return session.model.loss(*parts[-1])


def add_report(run: Path, step: int, result: Result) -> None:
    """Keep a diagnosis or a check beside the run, for the microscope; nothing if that is not possible now.

    A run that is being trained belongs to its trainer, and one without a run file has no place for it.
    """
    try:
        file = RunFile.open(run)
        try:
            last = file.info()["last_step"]
        finally:
            file.close()
        recorder = Recorder(run, continue_from=last or 0)
    except InputError:
        return
    recorder.event(step, time.time(), "report", report_data(result))
    recorder.close(None)
