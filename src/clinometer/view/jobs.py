"""Replays on demand: `clinometer explain … --machine` in a process of its own, one at a time.

The page's process never imports torch, and a replay that is cancelled or killed takes nothing with it.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clinometer.messages import say, sentences
from clinometer.record.replays.replays import Replay
from clinometer.view.errors import ApiError

KEPT_JOBS = 20
GRACE_SECONDS = 5.0
LONGEST_LINE = 65_536
STAGES = ("start", "restore", "replay", "attribute")


@dataclass
class Job:
    """One replay, running or over."""

    run: str
    folder: Path
    step: int
    tensor: str | None
    index: tuple[int, ...] | None
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: str = "running"
    stage: str = "start"
    progress: int = 0
    total: int = 0
    error: str | None = None
    error_key: str | None = None
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    process: subprocess.Popen[str] | None = None

    @property
    def subject(self) -> tuple[Any, ...]:
        return (self.run, self.step, self.tensor, self.index)

    def to_dict(self, language: str) -> dict[str, Any]:
        error = None
        if self.error_key is not None:
            error = {"key": self.error_key, "text": self.error or say(self.error_key, language)}
        return {
            "id": self.id,
            "run": self.run,
            "step": self.step,
            "tensor": self.tensor,
            "index": None if self.index is None else list(self.index),
            "state": self.state,
            "stage": self.stage,
            "stage_text": say(f"view.stage.{self.stage}", language),
            "progress": self.progress,
            "total": self.total,
            "seconds": round((self.ended or time.monotonic()) - self.started, 1),
            "error": error,
        }


class Busy(ApiError):
    """Another replay is running."""

    def __init__(self, job: Job, language: str) -> None:
        super().__init__(409, "view.busy", step=job.step)
        self.more = {"job": job.to_dict(language)}


class Replays:
    """The jobs of one server."""

    def __init__(self, command: Sequence[str] | None = None) -> None:
        self._command = list(command or (sys.executable, "-m", "clinometer"))
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def start(
        self,
        run: str,
        folder: Path,
        step: int,
        tensor: str | None,
        index: tuple[int, ...] | None,
        *,
        language: str,
    ) -> tuple[Job, bool]:
        """The job, and whether it is new. Raises `Busy` while another replay runs."""
        job = Job(run, folder, step, tensor, index)
        with self._lock:
            if self._closed:
                raise ApiError(503, "view.closing")
            for other in self._jobs.values():
                if other.state == "running":
                    if other.subject == job.subject:
                        return other, False
                    raise Busy(other, language)
            if _is_there(job):
                job.state, job.ended, job.stage = (
                    "done",
                    time.monotonic(),
                    "attribute" if tensor else "replay",
                )
                self._keep(job)
                return job, False
            self._keep(job)
            thread = threading.Thread(
                target=self._work, args=(job, language), name="clinometer-replay", daemon=True
            )
            self._threads = [t for t in self._threads if t.is_alive()] + [thread]
            thread.start()
        return job, True

    def get(self, identity: str) -> Job:
        job = self._jobs.get(identity)
        if job is None:
            raise ApiError(404, "view.no_job", job=identity[:40])
        return job

    def all(self) -> list[Job]:
        with self._lock:
            return list(reversed(self._jobs.values()))

    def cancel(self, identity: str) -> Job:
        """Ask the worker to stop, and end it if it does not within five seconds."""
        job = self.get(identity)
        with self._lock:
            if job.state != "running":
                return job
            job.state = "cancelled"
            job.ended = time.monotonic()
            process = job.process
        if process is not None:
            _end(process)
        return job

    def close(self) -> None:
        """End the worker; called when the server stops."""
        self._closed = True
        for job in self.all():
            if job.state == "running":
                self.cancel(job.id)
        for thread in self._threads:
            thread.join(GRACE_SECONDS)

    def _keep(self, job: Job) -> None:
        self._jobs[job.id] = job
        while len(self._jobs) > KEPT_JOBS:
            self._jobs.popitem(last=False)

    def _work(self, job: Job, language: str) -> None:
        arguments = ["explain", str(job.folder.resolve()), "--step", str(job.step), "--machine"]
        if job.tensor is not None:
            arguments.append(f"--parameter={job.tensor}")  # one word: a name may begin with a dash
            # A tensor without axes has one entry and no index.
            arguments += [f"--index={','.join(map(str, job.index))}"] if job.index else []
        environment = {**os.environ, "CLINOMETER_LANG": language}
        try:
            process = subprocess.Popen(
                [*self._command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=environment,
            )
        except OSError as error:
            self._settle(
                job, "failed", key="view.worker", text=say("view.worker", language, reason=str(error))
            )
            return
        with self._lock:
            job.process = process
            cancelled = job.state != "running"
        if cancelled:
            _end(process)
        said: list[str] = []
        listener = threading.Thread(target=_keep_tail, args=(process.stderr, said), daemon=True)
        listener.start()
        finished = False
        assert process.stdout is not None
        with process.stdout:
            while line := process.stdout.readline(LONGEST_LINE):
                finished |= self._hear(job, line)
        code = process.wait()
        listener.join(1)
        job.process = None
        if finished:
            self._settle(job, "done")
        elif job.state == "running":
            reason = " ".join(said)[-500:] or f"exit {code}"
            self._settle(job, "failed", key="view.worker", text=say("view.worker", language, reason=reason))

    def _hear(self, job: Job, line: str) -> bool:
        """Take in one line of the worker; True when it is done."""
        try:
            told = json.loads(line)
        except ValueError:
            return False
        if not isinstance(told, dict):
            return False
        if "error" in told:
            key = told.get("key") if told.get("key") in sentences("en") else None
            self._settle(job, "failed", key=key or "view.worker", text=str(told["error"])[:2_000])
        elif "progress" in told:
            stage = told.get("stage")
            job.stage = stage if stage in STAGES else job.stage
            job.progress, job.total = _count(told.get("progress")), _count(told.get("total"))
        return "done" in told

    def _settle(self, job: Job, state: str, *, key: str | None = None, text: str | None = None) -> None:
        with self._lock:
            if job.state == "running":
                job.state, job.error_key, job.error = state, key, text
                job.ended = time.monotonic()


def _is_there(job: Job) -> bool:
    replay = Replay.open(job.folder, job.step)
    if replay is None:
        return False
    if job.tensor is None:
        return replay.by_token  # a replay of an earlier version is made again
    return replay.weight(job.tensor, job.index or ()) is not None


def _count(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 2**53 else 0


def _keep_tail(stream: Any, said: list[str]) -> None:
    with stream:
        while line := stream.readline(LONGEST_LINE):
            said.append(line.strip())
            del said[:-20]


def _end(process: subprocess.Popen[str]) -> None:
    """SIGTERM, then, from a thread that waits, SIGKILL."""
    process.send_signal(signal.SIGTERM)

    def insist() -> None:
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()

    threading.Thread(target=insist, daemon=True).start()
