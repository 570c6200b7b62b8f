"""`clinometer explain`: one step of a run again, as a whole or for one weight."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from clinometer.gradients.report.result import Result
from clinometer.messages import InputError, say
from clinometer.record.replays.replays import Replay
from clinometer.text.tokenizer import Tokenizer
from clinometer.training.replay.replay import recorded, replay_step, require_step
from clinometer.training.replay.replay_folder import find_replay
from clinometer.training.replay.replayed_weight import explain_weight, find_place
from clinometer.training.replay.step_summary import StepSummary
from clinometer.training.run.display import RunDisplay
from clinometer.training.run.run_folder import RunFolder

_MACHINE_SECONDS = 0.1


def explain_command(
    console: Console,
    run: Path,
    step: int,
    parameter: str | None = None,
    index: str | None = None,
    *,
    machine: bool = False,
    inexact: bool = False,
) -> int:
    """Print what a step did, to the model or to one weight; with `machine`, lines of JSON for a program.

    Returns 0; 2 where a program reads that it cannot be explained; 130 or 143 after Ctrl-C or SIGTERM.
    """
    output = _MachineOutput() if machine else _TerminalOutput(RunDisplay(console))
    try:
        with _stop_on_signals():
            path, results = _explain(output.progress, run, step, parameter, index, inexact=inexact)
            output.done(path, results)
        return 0
    except _StopSignal as stop:
        output.failed("explain.stopped", say("explain.stopped", step=step))
        return 128 + stop.signal
    except InputError as error:
        if not machine:
            raise
        output.failed(error.key, str(error))
        return 2
    finally:
        output.end()


def _explain(
    progress: Callable[[str, int, int], None],
    run: Path,
    step: int,
    parameter: str | None,
    index: str | None,
    *,
    inexact: bool,
) -> tuple[Path, list[Result]]:
    """The folder of the replayed step, and what there is to show of it."""
    if index is not None and parameter is None:
        raise InputError("explain.index_alone", index=index)
    place = _read_index(index)
    folder = RunFolder.open(run)
    rows = recorded(folder)
    require_step(folder, rows, step)
    if parameter is not None:  # before the work, which may be long
        model = folder.config.model.transformer(Tokenizer.load(folder.tokenizer).vocab_size)
        parameter, place = find_place(model.weight_shapes(), parameter, place)
    found = find_replay(run, step, rows[step].loss, rows[step].norm)
    path = replay_step(run, step, progress, inexact=inexact) if found is None else found.path
    replay = found or Replay.at(path)
    if replay is None:  # another process has pruned it already
        raise InputError("explain.damaged", path=path)
    summary = StepSummary(replay.step_info, run, path)
    if parameter is None or not summary.taken:
        return path, [summary]
    progress("attribute", 0, 1)
    explained = explain_weight(path, parameter, place)
    progress("attribute", 1, 1)
    return path, [summary.headed(), explained.anatomy, explained.attribution]


class _TerminalOutput:
    """For a person: a progress bar on a terminal, and the results."""

    def __init__(self, display: RunDisplay) -> None:
        self._display, self._stage = display, ""

    def progress(self, stage: str, done: int, total: int) -> None:
        keys = {"encode": "train.encoding_bar", "replay": "explain.replaying"}
        if stage not in keys:
            return
        if stage != self._stage:
            self.end()
            self._stage = stage
        self._display.progress(keys[stage], done, total)

    def end(self) -> None:
        self._display.end()

    def done(self, path: Path, results: Sequence[Result]) -> None:
        self.end()
        for i, result in enumerate(results):
            if i:
                self._display.console.print()
            self._display.console.print(result)

    def failed(self, key: str, text: str) -> None:
        self.end()
        self._display.console.print(text, highlight=False, markup=False)


class _MachineOutput:
    """Lines of JSON on standard output: progress, then one of {"done"} and {"error", "key"}."""

    def __init__(self) -> None:
        self._last, self._stage = 0.0, ""

    def progress(self, stage: str, done: int, total: int) -> None:
        stage = "restore" if stage == "encode" else stage  # a program reads three stages
        now = time.monotonic()
        if stage == self._stage and done < total and now - self._last < _MACHINE_SECONDS:
            return
        self._last, self._stage = now, stage
        _write(progress=done, total=total, stage=stage)

    def end(self) -> None:
        pass

    def done(self, path: Path, results: Sequence[Result]) -> None:
        _write(done=str(path))

    def failed(self, key: str, text: str) -> None:
        _write(error=text, key=key)


class _StopSignal(KeyboardInterrupt):
    """Ctrl-C or SIGTERM as an exception that passes through the work."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


@contextmanager
def _stop_on_signals() -> Iterator[None]:
    def stop(number: int, _frame: object) -> None:
        for other in previous:  # a second signal must not disturb the removal of what was begun
            signal.signal(other, signal.SIG_IGN)
        raise _StopSignal(number)

    previous: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread: the program that called us handles signals
        pass
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _read_index(text: str | None) -> tuple[int, ...]:
    """ "3,5" or "[3, 5]" as (3, 5); nothing for the whole tensor."""
    bare = (text or "").strip().removeprefix("[").removesuffix("]").strip()
    try:
        return tuple(int(part) for part in bare.split(",")) if bare else ()
    except ValueError:
        raise InputError("explain.index_text", index=text) from None


def _write(**values: Any) -> None:
    print(json.dumps(values, ensure_ascii=False), flush=True)
