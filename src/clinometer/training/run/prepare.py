"""From a configuration to everything the loop needs: tokens, model, optimizers, and their state."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from clinometer.distributed.launch import host_name
from clinometer.messages import InputError
from clinometer.text.corpus import Corpus, open_corpus
from clinometer.text.sampler import windows_per_epoch
from clinometer.text.token_shards import TokenData, find_tokens
from clinometer.text.tokenizer import Tokenizer
from clinometer.training.checkpoints import checkpoint, retention
from clinometer.training.checkpoints.generator_state import restore_random_state
from clinometer.training.ranks.world import World
from clinometer.training.run.computation import first_model, first_optimizers, learning_rate
from clinometer.training.run.finite_checks import first_spoilt
from clinometer.training.run.json_lines import JsonLines
from clinometer.training.run.run_folder import (
    RunFolder,
    describe_environment,
    with_full_paths,
)
from clinometer.training.run.run_tokens import Notices, cache_folder, encode_saying, tokenizer_of
from clinometer.training.run.session import TrainingSession
from clinometer.training.settings.config import FREE_ON_RESUME, RunConfig, config_from, differences
from clinometer.training.settings.precision import Choices, choose
from clinometer.whole_files import write_whole


def start(config: RunConfig, path: Path, notices: Notices, world: World | None = None) -> TrainingSession:
    """A new run in the new folder `path`; nothing of it is left if the corpus cannot be used.

    Of several ranks the first one calls this, or `resume`, and the others `attend`.

    Raises `InputError` for a folder in use, a bad corpus or tokenizer, a device that is not there.
    """
    once = _is_stream(config.data.corpus)
    corpus = None if once else open_corpus(config.data.corpus)
    existed = os.path.exists(path)
    folder = RunFolder.create(path, config)
    try:
        if corpus is None:  # standard input, a pipe: it cannot be read again on resume, so the run keeps it
            config = _keep_stream(config, folder)
            corpus = open_corpus(config.data.corpus)
        if fields := corpus.json_fields():
            notices.notice("train.json_lines", corpus=corpus.name, fields=", ".join(fields[:6]))
        return _prepare(config, folder, corpus, notices, world or World(), state=None, last=None)
    except Exception:
        # Nothing was learned yet: a wrong setting must not cost a "run folder exists" on the next try.
        _remove_unstarted(folder, existed)
        raise
    except BaseException:
        folder.unlock()
        raise


def resume(
    path: Path,
    changed: RunConfig | None,
    notices: Notices,
    world: World | None = None,
    *,
    unattended: bool = False,
) -> TrainingSession:
    """The run in `path` where its last checkpoint left it, or from its beginning if it has none yet.

    `changed` is the configuration given now, if any. `unattended`: nobody is there to remove a checkpoint
    that cannot be read, so it is set aside with a notice, and the one before it is taken: the run then takes
    the same steps again. Raises `InputError` if the configuration differs in a field that would alter the
    run, if the corpus has changed, or if no checkpoint can be read.
    """
    folder = RunFolder.open(path)
    folder.lock()
    try:
        return _resume(folder, changed, notices, world or World(), unattended)
    except BaseException:
        folder.unlock()
        raise


def attend(notices: Notices, world: World) -> TrainingSession:
    """The run that rank 0 starts or resumes, on another rank. Raises `InputError` without its folder."""
    told = world.share()
    path = Path(told["path"])
    if not (path / "config.toml").is_file():
        raise InputError("parallel.not_shared", path=path, host=host_name())
    folder = RunFolder.open(path)
    config = config_from(told["config"])
    tokenizer = Tokenizer.load(folder.tokenizer)
    where = cache_folder(folder) / "tokens"
    data = find_tokens(where, told["content"], tokenizer.hash, config.data.validation_fraction)
    data = data or encode_saying(config, folder, open_corpus(config.data.corpus), tokenizer, notices)
    if data.header.content_hash != told["content"]:
        raise InputError("resume.data", path=path, corpus=config.data.corpus)
    last = None if told["last"] is None else Path(told["last"])
    state = None if last is None else checkpoint.read_state(last)
    choices = Choices(**told["choices"])
    return _assemble(config, folder, tokenizer, data, choices=choices, world=world, state=state, last=last)


def _resume(
    folder: RunFolder, changed: RunConfig | None, notices: Notices, world: World, unattended: bool
) -> TrainingSession:
    path, config = folder.path, folder.config
    retention.sweep(folder.checkpoints)
    if changed is not None and (found := differences(config, with_full_paths(changed))):
        wrong = {name: values for name, values in found.items() if name not in FREE_ON_RESUME}
        if wrong:
            fields = "; ".join(f"{name}: {old!r} → {new!r}" for name, (old, new) in wrong.items())
            raise InputError("resume.config", path=path, fields=fields)
        config = with_full_paths(changed)
    last, state = _newest(folder, notices) if unattended else _last(folder)
    if last is None:
        notices.notice("train.from_start", path=path)
    if state is not None and config.training.steps < state["step"]:
        raise InputError("resume.steps", path=path, steps=config.training.steps, done=state["step"])
    if state is not None:
        _say_if_the_rate_jumps(folder.config, config, state["step"], notices)
    corpus = open_corpus(config.data.corpus)
    session = _prepare(config, folder, corpus, notices, world, state=state, last=last)
    if session.metrics.lost or session.skipped.lost:
        notices.notice("run.lines_lost", path=path, lost=session.metrics.lost + session.skipped.lost)
    if config != folder.config:
        write_whole(folder.config_file, config.to_toml())
    return session


def _last(folder: RunFolder) -> tuple[Path | None, dict[str, Any] | None]:
    saved = checkpoint.checkpoints(folder.checkpoints)
    return (saved[-1], checkpoint.read_state(saved[-1])) if saved else (None, None)


def _newest(folder: RunFolder, notices: Notices) -> tuple[Path | None, dict[str, Any] | None]:
    """The newest checkpoint that is whole. Raises `InputError` if there are some and none is."""
    saved = checkpoint.checkpoints(folder.checkpoints)
    for older, path in reversed(list(enumerate(saved))):
        try:
            state = checkpoint.read_state(path)
            for name, written in state["files"].items():
                checkpoint.verify(path / name, written)
        except InputError as error:
            if not older:
                raise
            aside = retention.set_aside(path)
            step = checkpoint.step_of(saved[older - 1])
            notices.notice("resume.set_aside", error=error, aside=aside, step=step)
        else:
            return path, state
    return None, None


def _say_if_the_rate_jumps(before: RunConfig, now: RunConfig, step: int, notices: Notices) -> None:
    """More steps stretch the schedule: the rate at this step is then another than the run has come to."""
    if now.training.steps == before.training.steps or not step:
        return
    old, new = learning_rate(before, step), learning_rate(now, step + 1)
    if not 0.9 <= new / old <= 1.1:
        notices.notice("resume.rate", old=f"{old:.3g}", new=f"{new:.3g}", steps=now.training.steps)


def _prepare(
    config: RunConfig,
    folder: RunFolder,
    corpus: Corpus,
    notices: Notices,
    world: World,
    *,
    state: dict[str, Any] | None,
    last: Path | None,
) -> TrainingSession:
    if config.training.batch_size < world.size:
        raise InputError("parallel.batch", batch_size=config.training.batch_size, ranks=world.size)
    tokenizer = tokenizer_of(config, folder, corpus, notices)
    data = encode_saying(config, folder, corpus, tokenizer, notices)
    seen = {"content": data.header.content_hash, "tokenizer": tokenizer.hash}
    if state is not None and state["data"] not in (
        None,
        seen,
    ):  # None: an imported model, not yet trained here
        raise InputError("resume.data", path=folder.path, corpus=config.data.corpus)
    windows_per_epoch(len(data.train), config.model.context_length)  # raises if the text is too short

    model_config = config.model.transformer(tokenizer.vocab_size)
    if state is None or state["choices"] is None:
        tokens = config.training.steps * config.training.batch_size * model_config.context_length
        choices = choose(
            device=config.training.device,
            precision=config.training.precision,
            compile=config.training.compile,
            total_flops=tokens * model_config.flops_per_token(),
        )
    else:
        choices = Choices(**state["choices"])
        choose(device=choices.device, precision=choices.precision, compile="off", total_flops=0.0)
        if (
            choices.ranks != world.size
        ):  # other ranks, other bits: nothing is to be kept of how they were made
            choices = dataclasses.replace(choices, threads=torch.get_num_threads())
    choices = dataclasses.replace(choices, ranks=world.size, parallel=world.choose(config.training.parallel))
    if state is None or state["choices"] is None:
        environment = describe_environment() | {"choices": dataclasses.asdict(choices)}
        write_whole(folder.environment_file, json.dumps(environment, indent=1, ensure_ascii=False))
    world.share(
        {
            "path": str(folder.path.absolute()),
            "config": config.to_dict(),
            "content": data.header.content_hash,
            "choices": dataclasses.asdict(choices),
            "last": None if last is None else str(last.absolute()),
        }
    )
    return _assemble(config, folder, tokenizer, data, choices=choices, world=world, state=state, last=last)


def _assemble(
    config: RunConfig,
    folder: RunFolder,
    tokenizer: Tokenizer,
    data: TokenData,
    *,
    choices: Choices,
    world: World,
    state: dict[str, Any] | None,
    last: Path | None,
) -> TrainingSession:
    """What every rank makes for itself, once it is known what the run is and what it computes with."""
    if not world.alone:
        choices = dataclasses.replace(choices, device=world.device_of(choices.device))
    world.begin(torch.device(choices.device), choices.parallel, config.training.rank_patience)
    if torch.get_num_threads() != choices.threads:
        torch.set_num_threads(choices.threads)  # sums are split by thread: other threads, other bits
    model = first_model(config, choices, tokenizer.vocab_size, world)
    model.recompute_blocks(config.training.activation_checkpointing)
    optimizers = first_optimizers(config, model)
    if last is not None and state is not None:  # before anything is cut back to where it stood
        held = optimizers if state["optimizers"] else ()
        checkpoint.load_checkpoint(last, model, held, world.rank, world.size)
        if (spoilt := first_spoilt(model.named_parameters(), optimizers, world)) is not None:
            raise InputError("checkpoint.not_finite", path=last, tensor=spoilt.described)
    sizes = (state["metrics_bytes"], state["skipped_bytes"]) if state else (0, 0)
    metrics, skipped = (
        JsonLines(path if world.first else None, size)
        for path, size in zip((folder.metrics_file, folder.skipped_file), sizes, strict=True)
    )
    session = TrainingSession(
        config=config,
        folder=folder,
        choices=choices,
        tokenizer=tokenizer,
        data=data,
        model=model,
        optimizers=optimizers,
        world=world,
        metrics=metrics,
        skipped=skipped,
    )
    if state is not None:
        restore_random_state(state["random"])
        session.step = state["step"]
        session.skipped_in_a_row = state["skipped_in_a_row"]
        session.best_loss, session.best_step = state["best_loss"], state["best_step"]
    return session


def _is_stream(corpus: str) -> bool:
    """Whether the corpus can be read only once: standard input, a named pipe, `<(command)`."""
    path = corpus  # os.path returns False for a name that is too long, where Path raises
    return corpus == "-" or (os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path))


def _keep_stream(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The same configuration with its text in the run's own folder."""
    kept = folder.path.absolute() / "corpus.txt"
    given = config.data.corpus
    with (
        kept.open("wb") as file,
        nullcontext(sys.stdin.buffer) if given == "-" else open(given, "rb") as text,
    ):
        shutil.copyfileobj(text, file)
    if not kept.stat().st_size:
        raise InputError("config.empty_stream", given=given)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, corpus=str(kept)))
    write_whole(folder.config_file, config.to_toml())
    return config


def _remove_unstarted(folder: RunFolder, existed: bool) -> None:
    folder.unlock()
    if existed:  # the user's own empty folder: leave it, empty
        for entry in folder.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    else:
        shutil.rmtree(folder.path, ignore_errors=True)
