"""`clinometer explain`: one step of a run again, as a whole or for one weight."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from clinometer.gradients.attribute.tokens import Text
from clinometer.gradients.report.document import (
    Document,
    Line,
    Table,
    code,
    dim,
    fault,
    name,
    note,
    number,
    sentence,
)
from clinometer.gradients.report.formatting import format_number
from clinometer.gradients.report.result import Result
from clinometer.messages import InputError, say
from clinometer.record.replays.replays import Replay
from clinometer.text.tokenizer import Tokenizer
from clinometer.training.replay.replay import recorded, replay_step, require_step
from clinometer.training.replay.replay_folder import find_replay
from clinometer.training.replay.replayed_weight import explain_weight, find_place
from clinometer.training.run.display import RunDisplay
from clinometer.training.run.run_folder import RunFolder

_MACHINE_SECONDS = 0.1
_LISTED = 3


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
    told = _Machine() if machine else _Shown(RunDisplay(console))
    try:
        with _stopped_by_signals():
            path = _explain(console, told, run, step, parameter, index, inexact)
        told.done(path)
        return 0
    except _Stopped as stopped:
        told.failed("explain.stopped", say("explain.stopped", step=step))
        return 128 + stopped.signal
    except InputError as error:
        if not machine:
            raise
        told.failed(error.key, str(error))
        return 2
    finally:
        told.end()


def _explain(
    console: Console,
    told: _Machine | _Shown,
    run: Path,
    step: int,
    parameter: str | None,
    index: str | None,
    inexact: bool,
) -> Path:
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
    path = replay_step(run, step, told.progress, inexact=inexact) if found is None else found.path
    replay = found or Replay.at(path)
    if replay is None:  # another process has pruned it already
        raise InputError("explain.damaged", path=path)
    summary = StepSummary(replay.step_info, run, path)
    explained = None
    if parameter is not None and summary.taken:
        told.progress("attribute", 0, 1)
        explained = explain_weight(path, parameter, place)
        told.progress("attribute", 1, 1)
    told.end()
    if isinstance(told, _Shown):
        if explained is None:
            console.print(summary)
        else:
            console.print(summary.headed())
            for result in (explained.anatomy, explained.attribution):
                console.print()
                console.print(result)
    return path


class StepSummary(Result):
    """A replayed step as a whole."""

    def __init__(self, info: Mapping[str, Any], run: Path, path: Path, whole: bool = True) -> None:
        self._info, self._run, self._path, self._all = info, run, path, whole

    @property
    def taken(self) -> bool:
        return bool(self._info["taken"])

    def headed(self) -> StepSummary:
        """Only which step it is, and whether it is the run's own."""
        return StepSummary(self._info, self._run, self._path, whole=False)

    def entries(self) -> Mapping[str, Any]:
        return self._info["tensors"]

    def facts(self) -> Mapping[str, Any]:
        return self._info

    def document(self, language: str | None = None) -> Document:
        info = self._info
        lines: Document = [
            Line(sentence("explain.title", language, step=info["step"], run=name(str(self._run))))
        ]
        if info["differs"] is None and not info["exact"]:
            off = number(f"{info['off']:.1e}")
            values: dict[str, Any] = {"ranks": number(str(info["ranks"])), "off": off}
            lines.append(Line((note("· "), *sentence("explain.ranks", language, **values)), 2, 2))
        elif info["exact"]:
            origin = "explain.exact" if info["from_step"] else "explain.exact_start"
            lines.append(Line((dim(say(origin, language, base=info["from_step"])),), 2, 2))
        else:
            values = dict(info["differs"] or {})
            for key in ("recorded", "found"):
                values[key] = number(repr(float(values[key])))
            lines.append(Line((fault("✗ "), *sentence("explain.inexact", language, **values)), 2, 2))
        if not self.taken:
            values = {"loss": number(_shown(info["loss"])), "norm": number(_shown(info["total_norm"]))}
            lines.append(Line((note("· "), *sentence("explain.skipped", language, **values)), 2, 2))
        return [*lines, *self._body(language)] if self._all else lines

    def _body(self, language: str | None) -> Document:
        info = self._info
        loss: list[Any] = [number(_shown(info["loss_before"]))]
        if self.taken:
            loss += [" → ", number(_shown(info["loss_after"]))]
        clipped = say("explain.clipped", language, factor=_shown(info["clip"]), limit=f"{info['max_norm']}")
        rows = [
            (
                say("explain.loss", language),
                loss,
                dim(say("explain.on_batch", language) if self.taken else ""),
            ),
            (
                say("explain.norm", language),
                number(_shown(info["total_norm"])),
                dim(clipped if info["clip"] != 1 else ""),
            ),
            (say("explain.lr", language), number(_shown(info["lr"])), dim(info["optimizer"])),
        ]
        lines: Document = [Table(rows, "lll", 2)]
        if self.taken:
            values = {
                "predicted": number(_shown(info["predicted"], sign=True)),
                "happened": number(_shown(float(info["loss_after"]) - float(info["loss_before"]), sign=True)),
            }
            lines.append(Line(sentence("step.predicted_happened", language, **values), 2))
            lines.append(Line((*sentence("explain.moved", language), "  ", *_between(self._movers())), 2, 4))
        if hardest := self._hardest():
            lines.append(Line((*sentence("explain.hardest", language), "  ", *_between(hardest)), 2, 4))
        lines.append(Line((dim(say("explain.kept", language, path=self._path)),), 2, 2))
        return lines

    def _movers(self) -> list[list[Any]]:
        ratios = {
            key: float(told["update_norm"]) / float(told["weight_norm"])
            for key, told in self._info["tensors"].items()
            if float(told["weight_norm"])
        }
        most = sorted(ratios, key=lambda key: ratios[key], reverse=True)[:_LISTED]
        return [[name(key), " ", number(_shown(ratios[key]))] for key in most]

    def _hardest(self) -> list[list[Any]]:
        batch = self._info["batch"]
        losses = torch.tensor([[float(x) for x in row] for row in batch["loss"]])
        pieces = {
            i: piece
            for ids, said in zip(batch["targets"], batch["target_pieces"], strict=True)
            for i, piece in zip(ids, said, strict=True)
        }
        text = Text(batch["targets"], pieces.__getitem__)
        most = losses.nan_to_num(nan=float("inf")).flatten().argsort(descending=True, stable=True)[:_LISTED]
        found = []
        for flat in most.tolist():
            at = divmod(flat, losses.shape[1])
            # The target stands one place after the position that foretells it.
            found.append([code(f"“{text.at(at)}” {at[0]}:{at[1] + 1} "), number(_shown(losses[at]))])
        return found


class _Shown:
    """Progress for a person: a bar on a terminal, nothing elsewhere."""

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

    def done(self, path: Path) -> None:
        pass

    def failed(self, key: str, text: str) -> None:
        self.end()
        self._display.console.print(text, highlight=False, markup=False)


class _Machine:
    """Lines of JSON on standard output: progress, then one of {"done"} and {"error", "key"}."""

    def __init__(self) -> None:
        self._last, self._stage = 0.0, ""

    def progress(self, stage: str, done: int, total: int) -> None:
        stage = "restore" if stage == "encode" else stage  # a program is told of three stages
        now = time.monotonic()
        if stage == self._stage and done < total and now - self._last < _MACHINE_SECONDS:
            return
        self._last, self._stage = now, stage
        _write(progress=done, total=total, stage=stage)

    def end(self) -> None:
        pass

    def done(self, path: Path) -> None:
        _write(done=str(path))

    def failed(self, key: str, text: str) -> None:
        _write(error=text, key=key)


class _Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, as an exception that passes through whatever is being done."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    def stop(number: int, _frame: object) -> None:
        for other in previous:  # a second one must not disturb the clearing away
            signal.signal(other, signal.SIG_IGN)
        raise _Stopped(number)

    previous: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
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


def _between(parts: list[list[Any]]) -> list[Any]:
    joined: list[Any] = []
    for i, part in enumerate(parts):
        joined += [*([dim(" · ")] if i else []), *part]
    return joined


def _shown(value: Any, *, sign: bool = False) -> str:
    return format_number(float(value), sign=sign, place="")


def _write(**values: Any) -> None:
    print(json.dumps(values, ensure_ascii=False), flush=True)
