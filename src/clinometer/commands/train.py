"""`clinometer train`: trains a new run or continues one, and reports how it ended."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from clinometer.distributed.launch import launched
from clinometer.messages import say
from clinometer.messages.folding import tell
from clinometer.record.write.new_folder import next_run_folder
from clinometer.training.checkpoints.checkpoint import checkpoints, step_of
from clinometer.training.ranks.world import World
from clinometer.training.run.display import RunDisplay, clock, short_count
from clinometer.training.run.loop import train
from clinometer.training.run.out_of_memory import is_out_of_memory, too_little_memory
from clinometer.training.run.prepare import attend, resume, start
from clinometer.training.run.recording import open_record
from clinometer.training.run.run_folder import RunFolder
from clinometer.training.run.session import Outcome, TrainingSession
from clinometer.training.run.stop_signals import ECHO_SECONDS, StopRequest, stop_on_signal
from clinometer.training.settings.config import RunConfig
from clinometer.training.settings.precision import matmul_rate


def configuration_of(run: Path) -> RunConfig:
    return RunFolder.open(run).config


def train_command(
    console: Console,
    config: RunConfig | None,
    run: Path | None,
    again: bool,
    began: Callable[[Path], None] | None = None,
) -> int:
    """Train a new run or continue one; returns the exit code. `began` is called with the run's folder.

    On several ranks (`torchrun … -m clinometer train …`) each calls this, and rank 0 alone prints.
    """
    world = World(launched())
    code = 0
    with world.guarded():
        code = _train(console, config, run, again, began=began if world.first else None, world=world)
        world.leave()
    return code


def _train(
    console: Console,
    config: RunConfig | None,
    run: Path | None,
    again: bool,
    *,
    began: Callable[[Path], None] | None,
    world: World,
) -> int:
    console.quiet = not world.first
    display = RunDisplay(console)
    # A launcher that starts the ranks again gives them the same command.
    again = again or (run is not None and world.restarted and os.path.isfile(run / "config.toml"))
    try:
        if not world.first:
            session = attend(display, world)
        elif again and run is not None:
            session = resume(run, config, display, world, unattended=not sys.stdin.isatty())
        else:
            config = config or RunConfig()
            if config.data.corpus == "python":  # the default: the user may have forgotten to name a text
                display.notice("train.python")
            session = start(config, run or next_run_folder(Path(config.data.corpus).stem), display, world)
    except KeyboardInterrupt:
        if run is not None and world.first and os.path.exists(run / "config.toml"):
            tell(console, say("train.interrupted_early", run=run))
        raise
    world.remedy = lambda: _how_to_go_on(session)
    with stop_on_signal(0.0 if world.alone else ECHO_SECONDS) as request:
        return _run_and_close(session, display, began, request)


def _run_and_close(
    session: TrainingSession, display: RunDisplay, began: Callable[[Path], None] | None, request: StopRequest
) -> int:
    """The handlers stay until the last file is closed: a late signal must not end what is being written."""
    try:
        return run_session(session, display, request, began)
    except KeyboardInterrupt:  # the second one: it did not wait for the step in hand
        if saved := checkpoints(session.folder.checkpoints):
            path = session.folder.path
            display.notice("train.interrupted", step=step_of(saved[-1]), path=saved[-1], run=path)
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        numel = session.model.config.num_parameters
        raise too_little_memory(error, session.config, numel, session.choices.device) from error
    finally:
        request.end()
        session.close()


def _how_to_go_on(session: TrainingSession) -> str:
    saved = checkpoints(session.folder.checkpoints)
    path = session.folder.path
    if not saved:
        return say("parallel.from_start", run=path)
    return say("parallel.go_on", step=step_of(saved[-1]), path=saved[-1], run=path)


def run_session(
    session: TrainingSession,
    display: RunDisplay,
    request: StopRequest,
    began: Callable[[Path], None] | None = None,
    onward: bool = True,
) -> int:
    """Print what will happen, train, and print how it ended and, if `onward`, what to do next."""
    config, model, header = session.config, session.model.config, session.data.header
    path, steps = session.folder.path, config.training.steps
    tokens_per_step = config.training.batch_size * model.context_length
    display.notice(
        "train.start",
        parameters=model.num_parameters,
        layers=model.num_layers,
        width=model.d_model,
        vocab_size=model.vocab_size,
        train_tokens=header.train_tokens,
        validation_tokens=header.validation_tokens,
    )
    choices, resumed = session.choices, bool(checkpoints(session.folder.checkpoints))
    epochs = steps * tokens_per_step / header.train_tokens
    display.notice(
        "train.choices_again" if resumed else "train.choices",
        device=choices.device,
        precision=choices.precision,
        why_precision=choices.why_precision,
        compile=say("train.on" if choices.compile else "train.off"),
        why_compile=choices.why_compile,
        steps=steps,
        tokens=tokens_per_step,
        epochs=f"{epochs:,.0f}" if epochs >= 9.995 else f"{epochs:.2f}",
    )
    if not session.world.alone:
        display.notice(f"parallel.{choices.parallel}", **session.world.described(model.num_parameters))
    display.notice("train.folder", path=path)
    if header.validation_tokens <= model.context_length:
        display.notice("train.no_validation")
    if session.step >= steps:
        display.notice("train.already_done", path=path, steps=steps, more=2 * steps)
        return 0
    if resumed:
        display.notice("train.resumed", path=path, step=session.step, steps=steps)

    record = open_record(session, display)
    if began is not None:
        began(path)
    display.begin(
        step=session.step,
        steps=steps,
        tokens_per_step=tokens_per_step,
        flops_per_token=model.flops_per_token(),
        peak=matmul_rate(torch.device(choices.device), choices.precision) * session.world.size
        if session.world.first
        else 0.0,
    )
    before, started = session.step, time.perf_counter()
    try:
        outcome = train(session, display, record, request)
    except BaseException as error:
        request.end()
        record.close(Outcome.INTERRUPTED if isinstance(error, KeyboardInterrupt) else None)
        raise
    finally:
        display.end()
    record.close(outcome)
    seconds = time.perf_counter() - started
    _say_outcome(session, display, outcome, seconds, (session.step - before) * tokens_per_step / seconds)
    if onward and outcome is Outcome.DONE:
        ours = config.data.corpus == "python"
        prompt = config.training.sample_prompt or ("def " if ours else say("train.prompt"))
        display.notice("train.next", run=path, prompt=prompt)
    return outcome.value


def _say_outcome(
    session: TrainingSession, display: RunDisplay, outcome: Outcome, seconds: float, tokens_per_second: float
) -> None:
    if session.spoilt:  # reported already
        return
    path = session.folder.path
    saved = checkpoints(session.folder.checkpoints)[-1]
    if outcome is Outcome.DONE:
        best = ""
        if session.best_loss is not None:
            best = say("train.done_validation", loss=session.best_loss, step=session.best_step)
        display.notice(
            "train.done",
            steps=session.step,
            time=clock(seconds),
            speed=short_count(tokens_per_second),
            loss=display.loss,
            validation=best,
            path=saved,
        )
    elif outcome is Outcome.NOT_FINITE:
        display.notice(
            "train.not_finite",
            step=session.step,
            count=session.skipped_in_a_row,
            path=session.folder.skipped_file,
        )
    else:
        display.notice("train.interrupted", step=session.step, path=saved, run=path)
