"""The training loop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from clinometer.lm.generate import generate
from clinometer.messages import InputError
from clinometer.optim.clipping import clip_grad_norm_
from clinometer.optim.make_optimizers import set_lr
from clinometer.text import sampler
from clinometer.training.run.computation import Computation, batch_of, learning_rate
from clinometer.training.run.finite_checks import NotFinite
from clinometer.training.run.recording import RunRecord
from clinometer.training.run.run_tokens import begin_with
from clinometer.training.run.session import Display, Outcome, TrainingSession
from clinometer.training.run.stop_signals import ECHO_SECONDS, StopRequest, stop_on_signal
from clinometer.whole_files import write_whole


def train(
    session: TrainingSession,
    display: Display,
    record: RunRecord | None = None,
    request: StopRequest | None = None,
) -> Outcome:
    """Take the steps that are left: batch → loss → backward → clip → step, with what comes between them.

    On Ctrl-C or SIGTERM the step in hand is finished and a checkpoint written (stop_signals.py). A caller
    that gives `request` takes the signals itself. A loss or gradient that is not finite takes no step and
    leaves the optimizer as it was; after `max_skipped` of them the run stops, and at once, without a
    checkpoint, when it is the weights or moments themselves that are not finite.
    """
    record = record or RunRecord()
    try:
        return _train(session, display, record, request)
    except NotFinite as found:
        session.spoilt = True
        display.notice(found.key, **found.values)
        return Outcome.NOT_FINITE


def _train(
    session: TrainingSession, display: Display, record: RunRecord, request: StopRequest | None
) -> Outcome:
    config, world = session.config, session.world
    last_step = config.training.steps
    signals = nullcontext(request) if request else stop_on_signal(0.0 if world.alone else ECHO_SECONDS)
    with signals as request:
        world.listen(request)
        while session.step < last_step:
            began = time.perf_counter()
            lr = learning_rate(config, session.step + 1)
            if session.compile_is_due():
                display.notice("train.compiling")
            loss, norm, taken = take_step(session, lr, before_step=record.before_step)
            session.skipped_in_a_row = 0 if taken else session.skipped_in_a_row + 1
            if not taken:
                record_skipped(session, loss, norm, display)

            row = {"step": session.step, "loss": loss, "lr": lr, "grad_norm": norm, "taken": taken}
            note(session, display, **finite_or_text(row), seconds=time.perf_counter() - began)
            display.step(row)
            record.step()

            at = session.step
            collect(session, display, record)
            if session.skipped_in_a_row == 1:  # are the weights good, so that going on can help?
                session.must_be_finite()
            if session.skipped_in_a_row >= config.training.max_skipped:
                request.end()
                session.checkpoint(must=True)
                return Outcome.NOT_FINITE
            improved = (at % config.eval_every == 0 or at == last_step) and validate(session, display, record)
            if config.training.sample_tokens and (at % config.sample_every == 0 or at == last_step):
                write_sample(session, display, record)
            asked = world.asked  # read once: a signal from here on means the next step, and its checkpoint
            if asked or at == last_step:
                request.end()
            if improved or asked or at % config.checkpoint_every == 0 or at == last_step:
                with request.uninterruptible():
                    save(session, display, record, must=bool(asked) or at == last_step)
            if asked:
                return Outcome.INTERRUPTED if asked == signal.SIGINT else Outcome.TERMINATED
    return Outcome.DONE


def take_step(
    computation: Computation,
    lr: float,
    *,
    before_clipping: Callable[[], None] | None = None,
    before_step: Callable[[float, float, bool], None] | None = None,
) -> tuple[float, float, bool]:
    """One step at the rate `lr`; returns its loss, the gradient's norm before clipping, whether it was taken.

    `before_clipping` is called while the gradients are the loss's own, `before_step` with what is returned,
    while they are still there.
    """
    set_lr(computation.optimizers, lr)
    loss, norm = forward_backward(computation, before_clipping)
    taken = math.isfinite(loss) and math.isfinite(norm)
    if before_step is not None:
        before_step(loss, norm, taken)
    if taken:
        for optimizer in computation.optimizers:
            optimizer.step()
    for optimizer in computation.optimizers:
        optimizer.zero_grad()
    computation.step += 1
    return loss, norm, taken


def forward_backward(
    computation: Computation, before_clipping: Callable[[], None] | None = None
) -> tuple[float, float]:
    """Gradient of the mean loss over the batch's tokens, clipped; returns that loss and the norm before.

    Micro-batches add up the *sums* of their token losses over the whole batch's token count, so the gradient
    is the full batch's however it is cut, and on however many ranks.
    """
    config, model, world = computation.config, computation.model, computation.world
    form = computation.take_form()
    token_ids, targets = batch_of(computation, computation.step)
    tokens = config.training.batch_size * targets.shape[1]
    parts = sampler.parts(config.training.batch_size, config.micro_batch_size, world.rank, world.size)
    total = torch.zeros((), device=computation.choices.device)
    for number, (part, counted) in enumerate(parts, 1):
        world.reach(computation.step + 1)
        with world.accumulating(model, last=number == len(parts)):
            with form, computation.choices.autocast():
                loss = world.loss(model, token_ids[part], targets[part])
            loss = loss / (tokens / world.size) if counted else loss * 0.0
            loss.backward()
        total += loss.detach() / world.size
    if before_clipping is not None:
        before_clipping()
    world.reach(computation.step + 1)
    return world.agree(total, clip_grad_norm_(model.parameters(), config.optim.max_norm))


@torch.no_grad()
def evaluate(session: TrainingSession) -> float | None:
    """Mean loss per token over the fixed validation set; None if the validation text is too short for one."""
    tokens, config = session.data.validation, session.config
    if len(tokens) < config.model.context_length + 1:
        return None
    count = config.training.eval_batches * config.training.batch_size
    starts = sampler.validation_windows(len(tokens), config.model.context_length, count)
    world = session.world
    mine = starts[world.rank :: world.size] if len(starts) > world.rank else starts[:1]
    total = 0.0
    # Eager: compiling the no-grad form too costs seconds, and validation is a small part of a run.
    with session.choices.uncompiled():
        for part, counted in sampler.parts(len(starts), config.micro_batch_size, world.rank, world.size):
            world.reach(session.step)
            arrays = sampler.gather(tokens, mine[part], config.model.context_length)
            token_ids, targets = (torch.from_numpy(a).to(session.choices.device) for a in arrays)
            with session.choices.autocast():
                loss = float(session.model.loss(token_ids, targets, reduction="sum"))
            total += loss if counted else 0.0
    world.settle(session.model)
    return world.sum([total])[0] / (len(starts) * config.model.context_length)


def validate(session: TrainingSession, display: Display, record: RunRecord) -> bool:
    """Measure and record the validation loss; true if it is the best so far."""
    loss = evaluate(session)
    if loss is None:
        return False
    note(session, display, **finite_or_text({"step": session.step, "validation_loss": loss}))
    best = math.isfinite(loss) and (session.best_loss is None or loss < session.best_loss)
    if best:
        session.best_loss, session.best_step = loss, session.step
    display.validation(session.step, loss, best)
    record.event("validation", loss=loss, best=best)
    return best


def write_sample(session: TrainingSession, display: Display, record: RunRecord) -> None:
    """Let the model continue the sample prompt, into samples/ and onto the screen."""
    training = session.config.training
    begin = begin_with(session.tokenizer, session.data.header.documents > 1, training.sample_prompt)
    # Its own generator, seeded by the step: sampling moves no random number of the run.
    generator = torch.Generator(device=session.choices.device).manual_seed(training.seed + session.step)
    prompt = torch.tensor([begin], device=session.choices.device)
    ids: list[int] = []
    try:
        with session.choices.uncompiled(), session.choices.autocast():
            for token in generate(
                session.model,
                prompt,
                training.sample_tokens,
                temperature=0.8,
                top_p=0.95,
                generator=generator,
                # Every rank takes as many tokens: each is a forward, in which the others are waited for.
                stop_id=session.tokenizer.end_of_text_id if session.world.alone else None,
            ):
                session.world.reach(session.step)
                ids.append(int(token[0]))
    except InputError as error:  # weights that are no longer finite: the run reports them itself
        display.notice(error.key, **error.values)
        return
    finally:
        session.world.settle(session.model)
    if not session.world.first:
        return
    if (end := session.tokenizer.end_of_text_id) in ids:
        ids = ids[: ids.index(end)]
    text = training.sample_prompt + session.tokenizer.decode(ids)
    session.must_be_there()
    try:
        session.folder.samples.mkdir(exist_ok=True)
        write_whole(session.folder.samples / f"step-{session.step:08d}.txt", text)
    except OSError as error:
        display.notice("train.sample_unkept", path=session.folder.samples, reason=error.strerror)
    display.sample(session.step, text)
    record.event("sample", text=text)


def save(session: TrainingSession, display: Display, record: RunRecord, *, must: bool) -> None:
    """Write a checkpoint. One that fails in the middle of a run is reported and the run continues; the last
    one is an error, because its work would be lost."""
    session.world.reach(session.step)
    session.must_be_there()
    try:
        if must:
            collect(session, display, record, wait=True)
        path = session.checkpoint(must=must)
        if path is not None:
            record.event("checkpoint", path=path.name)
    except InputError as error:
        if must or isinstance(error, NotFinite):
            raise
        display.notice("train.checkpoint_failed", reason=str(error))


def collect(session: TrainingSession, display: Display, record: RunRecord, *, wait: bool = False) -> None:
    """Look after the checkpoint that is being written beside the training, if there is one."""
    try:
        path = session.written(wait)
        if path is not None:
            record.event("checkpoint", path=path.name)
    except InputError as error:
        display.notice("train.checkpoint_failed", reason=str(error))


def note(session: TrainingSession, display: Display, **row: Any) -> None:
    """Add a row to metrics.jsonl; when a full disk begins to keep rows waiting, this is reported once."""
    before = session.metrics.trouble
    session.metrics.append(**row)
    if before is None and (trouble := session.metrics.trouble) is not None:
        display.notice("train.rows_wait", path=session.folder.metrics_file, reason=trouble.strerror)


def record_skipped(session: TrainingSession, loss: float, norm: float, display: Display) -> None:
    """Keep what is needed to look at the batch of the last step again."""
    config = session.config
    starts = sampler.sample_windows(
        len(session.data.train),
        config.model.context_length,
        config.training.batch_size,
        config.training.seed,
        session.step - 1,
    )
    row = {"step": session.step, "loss": loss, "grad_norm": norm, "windows": starts.tolist()}
    session.skipped.append(**finite_or_text(row))
    display.notice("train.skipped", step=session.step, loss=loss, norm=norm)


def finite_or_text(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what is not finite is written as text ("nan", "inf")."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
