"""The demonstration: a small model trained on Python's own source, and its gradients under the instrument."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from rich.console import Console

from clinometer.gradients.attribution import attribute
from clinometer.gradients.check import check_gradients
from clinometer.gradients.diagnosis import diagnose
from clinometer.gradients.step import explain_step
from clinometer.messages import say
from clinometer.optim.clipping import clip_grad_norm_
from clinometer.training.command import next_run_folder, run_session
from clinometer.training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainingConfig
from clinometer.training.display import RunDisplay
from clinometer.training.loop import batch_of
from clinometer.training.prepare import Session, start

DEMO = RunConfig(
    model=ModelConfig(context_length=128, d_model=192, num_layers=4, num_heads=6),
    data=DataConfig(vocab_size=2048),
    optim=OptimConfig(lr=6e-3),
    training=TrainingConfig(
        steps=280, compile="off", sample_tokens=120, sample_prompt="def ", eval_batches=8
    ),
)
"""About a minute on two cores."""

CHECKED_TOKENS = 32
"""Of one sequence: the check evaluates the loss some 160 times in float64."""


def demo_command(console: Console, run: Path | None, quick: bool) -> int:
    """Train the demonstration's model, then show one diagnosis, one check and one explained weight of it."""
    config = DEMO
    if quick:
        config = dataclasses.replace(
            config, training=dataclasses.replace(DEMO.training, steps=40, batch_size=8)
        )
    console.print(say("demo.begin"), highlight=False)
    display = RunDisplay(console)
    session = start(config, run or next_run_folder("demo"), display)
    try:
        code = run_session(session, display)
        if code == 0:
            look(console, display, session)
            console.print()
            console.print(say("demo.end", run=session.folder.path), highlight=False)
        return code
    finally:
        session.close()


def look(console: Console, display: RunDisplay, session: Session) -> None:
    """The trained model's gradients on the batch that would come next."""
    model = session.model
    token_ids, targets = batch_of(session, session.step)

    def loss() -> torch.Tensor:
        return model.loss(token_ids, targets)

    console.print()
    console.print(say("demo.diagnose"), style="bold", highlight=False)
    console.print(diagnose(model, loss, optimizer=session.optimizers[0]))

    console.print()
    console.print(say("demo.check"), style="bold", highlight=False)
    short = slice(None, 1), slice(None, CHECKED_TOKENS)
    checked = check_gradients(
        model,
        lambda: model.loss(token_ids[short], targets[short]),
        progress=lambda done, total: display.progress("demo.check_bar", done, total),
    )
    display.end()
    console.print(checked)

    name = f"layers.{session.config.model.num_layers // 2}.ffn.w1.weight"
    weight = model.get_parameter(name)
    model.zero_grad()
    loss().backward()
    assert weight.grad is not None
    largest = int(weight.grad.abs().argmax())
    index = divmod(largest, weight.shape[1])
    model.zero_grad()
    tokenizer = session.tokenizer
    pushed = attribute(model, loss, name, index, tokens=token_ids, decode=lambda i: tokenizer.decode([i]))

    loss().backward()
    console.print()
    console.print(say("demo.explain"), style="bold", highlight=False)
    with explain_step(session.optimizers[0], model, loss=loss) as anatomy:
        clip_grad_norm_(model.parameters(), session.config.optim.max_norm)
        session.optimizers[0].step()
    console.print(anatomy[name][index])
    model.zero_grad()
    console.print()
    console.print(say("demo.attribute"), style="bold", highlight=False)
    console.print(pushed)
