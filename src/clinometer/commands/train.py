"""What the commands do, once their arguments are read."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from clinometer.distributed.launch import launched
from clinometer.lm.generate import fit_prompt, generate
from clinometer.lm.llama_files import export_llama
from clinometer.messages import InputError, say
from clinometer.messages.folding import tell
from clinometer.training.checkpoints.checkpoint import checkpoints, step_of
from clinometer.training.ranks.world import World
from clinometer.training.run.display import RunDisplay, clock, printable, short_count
from clinometer.training.run.load_run import import_run, load_run
from clinometer.training.run.loop import Outcome, train
from clinometer.training.run.out_of_memory import is_out_of_memory, too_little_memory
from clinometer.training.run.prepare import TrainingSession, attend, resume, start
from clinometer.training.run.recording import open_record
from clinometer.training.run.run_folder import RunFolder
from clinometer.training.run.run_tokens import begin_with
from clinometer.training.run.stop_signals import ECHO_SECONDS, StopRequest, stop_on_signal
from clinometer.training.settings.config import LARGEST_SEED, DataConfig, RunConfig
from clinometer.training.settings.precision import choose_device, matmul_rate


def configuration_of(run: Path) -> RunConfig:
    return RunFolder.open(run).config


def train_command(
    console: Console,
    config: RunConfig | None,
    run: Path | None,
    again: bool,
    began: Callable[[Path], None] | None = None,
) -> int:
    """Train a new run or continue one; returns the exit code. `began` is told the run's folder.

    On several ranks (`torchrun … -m clinometer train …`) each calls this, and rank 0 alone speaks.
    """
    world = World(launched())
    code = 0
    with world.guarded():
        code = _train(console, config, run, again, began if world.first else None, world)
        world.leave()
    return code


def _train(
    console: Console,
    config: RunConfig | None,
    run: Path | None,
    again: bool,
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
            session = resume(run, config, display, world)
        else:
            config = config or RunConfig()
            if config.data.corpus == "python":  # the default: somebody may have meant to name a text
                display.notice("train.python")
            session = start(config, run or next_run_folder(config.data.corpus), display, world)
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
    """Say what is about to happen, train, and say how it ended and, if `onward`, what to do next."""
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
    if session.spoilt:  # told already
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


def next_run_folder(corpus: str) -> Path:
    """runs/<corpus>-<n>, the first number that is free."""
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(corpus).stem) or "run"
    number = 1
    while Path("runs", f"{name}-{number}").exists():
        number += 1
    return Path("runs", f"{name}-{number}")


def generate_command(
    console: Console,
    run: Path,
    *,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    checkpoint: str,
    device: str,
) -> int:
    """Stream a continuation of the prompt to standard output; what is said about it to standard error."""
    undecoded = next((i for i, sign in enumerate(prompt) if 0xDC80 <= ord(sign) <= 0xDCFF), None)
    if undecoded is not None:  # how Python hands on a byte of the command line that is not UTF-8
        raise InputError("cli.prompt_bytes", at=undecoded)
    where = choose_device(device)
    trained = load_run(run, checkpoint, where)
    seed = secrets.randbits(32) if seed is None else seed
    if not 0 <= seed <= LARGEST_SEED:
        raise InputError("config.seed", field="--seed", value=seed, largest=LARGEST_SEED)
    ids = trained.tokenizer.encode(prompt) or begin_with(trained.tokenizer, trained.separated, "")
    window, dropped = fit_prompt(torch.tensor([ids], device=where), trained.model.config)
    generator = torch.Generator(device=where).manual_seed(seed)
    continuation = generate(  # made before anything is printed: it refuses wrong settings
        trained.model,
        window,
        tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
        stop_id=trained.tokenizer.end_of_text_id,
    )
    tell(console, say("cli.from_checkpoint", step=trained.step, path=run, seed=seed), "dim")
    if dropped:
        kept = window.shape[-1]
        told = say("cli.prompt_cut", dropped=dropped, kept=kept)
        tell(console, told, "yellow")
    on_terminal = sys.stdout.isatty()
    out = sys.stdout
    stream = trained.tokenizer.decode_stream()

    def write(text: str) -> None:
        out.write(printable(text) if on_terminal else text)
        out.flush()

    write(prompt)
    try:
        for token in continuation:
            if int(token[0]) != trained.tokenizer.end_of_text_id:
                write(stream.push(int(token[0])))
        write(stream.finish())
    finally:
        write("\n")
    return 0


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


def import_command(console: Console, source: Path, run: Path, corpus: str) -> int:
    """Make a run of a Llama-type model that somebody else trained."""
    folder = import_run(source, run, RunConfig(data=DataConfig(corpus=corpus)))
    tell(console, say("cli.imported", path=folder.path))
    return 0
