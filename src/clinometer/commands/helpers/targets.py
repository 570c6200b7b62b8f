"""A run's folder or `file.py:function` as parameters and a closure, and the result shown or kept."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

from clinometer.gradients.report.result import Result
from clinometer.gradients.trace.inplace_errors import is_overwritten
from clinometer.messages import InputError
from clinometer.text import sampler
from clinometer.training.run.load_run import load_run
from clinometer.training.run.recording import add_report
from clinometer.training.run.run_tokens import Notices, open_tokens

CHECKED_SEQUENCES = 1
CHECKED_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Target:
    """The tensors to examine, the closure that returns their loss, and the optimizer if it is known."""

    params: Any
    closure: Callable[[], Any]
    optimizer: Any = None
    run: tuple[Path, int] | None = None
    """The run it is of, and the step of the checkpoint."""
    file: Path | None = None
    """The user's file it is from."""


def read_target(target: str, notices: Notices, *, short: bool = False) -> Target:
    """`RUN`, a run's folder, or `file.py:function`, whose function returns (params, closure[, optimizer]).

    Raises `InputError` if there is no such run, file or function, if its code fails, or if it returns
    something else.
    """
    file, colon, function = target.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_file(Path(file), function)
    if target.endswith(".py"):
        raise InputError("instrument.which_function", file=target)
    if colon and not os.path.exists(target):
        raise InputError("instrument.no_file", path=file)
    return _from_run(Path(target), notices, short)


def _from_run(path: Path, notices: Notices, short: bool) -> Target:
    """The run's newest model, on the batch that comes after its checkpoint, in float32 and uncompiled."""
    trained = load_run(path, "last")
    tokens, config = open_tokens(path, trained.tokenizer, notices)
    arrays = sampler.batch(
        tokens.train,
        context_length=config.model.context_length,
        batch_size=config.training.batch_size,
        seed=config.training.seed,
        step=trained.step,
    )
    token_ids, targets = (torch.from_numpy(a) for a in arrays)
    if short:  # the check runs in float64, some hundred times
        token_ids, targets = (t[:CHECKED_SEQUENCES, :CHECKED_TOKENS] for t in (token_ids, targets))
    model = trained.model.train()
    return Target(params=model, closure=lambda: model.loss(token_ids, targets), run=(path, trained.step))


def _from_file(path: Path, function: str) -> Target:
    if not os.path.isfile(path):
        raise InputError("instrument.no_file", path=path)
    module = _load(path)
    make = getattr(module, function, None)
    if not callable(make):
        names = [
            n
            for n, v in vars(module).items()
            if callable(v) and getattr(v, "__module__", "") == module.__name__
        ]
        raise InputError(
            "instrument.no_function", path=path, function=function, known=", ".join(names) or "-"
        )
    if needed := _needed(make):
        raise InputError("instrument.arguments", function=function, path=path, needed=", ".join(needed))
    given = _run(path, make)
    if isinstance(given, tuple) and len(given) in (2, 3) and callable(given[1]):
        optimizer = given[2] if len(given) == 3 else None
        return Target(params=given[0], closure=given[1], optimizer=optimizer, file=path)
    raise InputError("instrument.returns", function=function, path=path, type=type(given).__name__)


def _needed(make: Callable[..., Any]) -> list[str]:
    """The arguments without which it cannot be called."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]


def _load(path: Path) -> ModuleType:
    """The file as a module, run as `python file.py` would find its neighbours, but not as `__main__`."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.absolute()))
    sys.modules[path.stem] = module
    loader = spec.loader
    _run(path, lambda: loader.exec_module(module))
    return module


def _run(path: Path, call: Callable[[], Any]) -> Any:
    """The call's result; an exception in the user's file becomes a sentence with its line."""
    try:
        return call()
    except InputError:
        raise
    except Exception as error:
        line = getattr(error, "lineno", None) or _line_in(path, error) or "?"
        raise _failed(path, line, error) from error


def examine(target: Target, look: Callable[[], Any]) -> Any:
    """The result; what the user's closure raises becomes a sentence with its line, or with both lines."""
    try:
        return look()
    except InputError:
        raise
    except Exception as error:
        told = " ".join(getattr(error, "__notes__", ()))
        if told and (is_overwritten(error) or isinstance(error, IndexError)):
            raise InputError("instrument.overwritten", told=told) from error
        line = None if target.file is None else _line_in(target.file, error)
        if target.file is None or line is None:  # the error is ours
            raise
        raise _failed(target.file, line, error) from error


def _failed(path: Path, line: Any, error: Exception) -> InputError:
    return InputError("instrument.failed", path=path, line=line, error=f"{type(error).__name__}: {error}")


def _line_in(path: Path, error: BaseException) -> int | None:
    """The innermost line of a file that an error passed through."""
    file = str(path.absolute())  # as Python keeps it
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename in (file, str(path))]
    return lines[-1] if lines else None


def show(console: Console, result: Result, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result.to_dict(), ensure_ascii=False, indent=2))
    else:
        console.print(result)


def aside(console: Console, as_json: bool) -> Console:
    """The console for notices and bars: stderr if stdout carries JSON."""
    return Console(stderr=True) if as_json else console


def prints_to_stderr(as_json: bool) -> AbstractContextManager[Any]:
    """Send what the user's file prints to stderr if stdout carries JSON."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def keep(target: Target, result: Result) -> None:
    """Store the result beside the run, if the target is a run: the microscope shows it."""
    if target.run is not None:
        add_report(*target.run, result)
