"""The demonstration: a small model trained on Python's own source, and its gradients under the instrument."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

from rich.console import Console

from clinometer.commands.explain import explain_command
from clinometer.commands.train import run_session
from clinometer.gradients.check.check_gradients import check_gradients
from clinometer.gradients.diagnose.diagnose import diagnose
from clinometer.messages import say
from clinometer.messages.folding import tell
from clinometer.record.replays.replays import Replay
from clinometer.record.write.new_folder import next_run_folder
from clinometer.training.checkpoints.checkpoint import checkpoints, step_of
from clinometer.training.replay.replay import replay_step
from clinometer.training.run.computation import batch_of
from clinometer.training.run.display import RunDisplay
from clinometer.training.run.prepare import start
from clinometer.training.run.recording import add_report
from clinometer.training.run.session import TrainingSession
from clinometer.training.run.stop_signals import stop_on_signal
from clinometer.training.settings.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainingConfig,
)

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


def demo_command(console: Console, run: Path | None, quick: bool) -> tuple[int, Path]:
    """Train the demonstration's model, then show one diagnosis, one check and one step of one weight of it.

    Returns the exit code and the run's folder.
    """
    config = DEMO
    if quick:
        config = dataclasses.replace(
            config, training=dataclasses.replace(DEMO.training, steps=40, batch_size=8)
        )
    tell(console, say("demo.begin"))
    display = RunDisplay(console)
    session = start(config, run or next_run_folder("demo"), display)
    try:
        with stop_on_signal() as request:
            code = run_session(session, display, request, onward=False)
        if code == 0:
            look(console, display, session)
    finally:
        session.close()
    if code == 0:
        console.print()
        tell(console, say("demo.end", run=session.folder.path, clinometer=_how_to_call()))
    return code, session.folder.path


def _how_to_call() -> str:
    """`clinometer`, or its path where the shell would not find it: `make demo` activates nothing."""
    ours = Path(sys.executable).parent / "clinometer"
    if shutil.which("clinometer") or not ours.exists():
        return "clinometer"
    here = Path.cwd()
    return str(ours.relative_to(here) if ours.is_relative_to(here) else ours)


def look(console: Console, display: RunDisplay, session: TrainingSession) -> None:
    """The trained model's gradients on the batch that would come next, and one of its steps again."""
    model, path = session.model, session.folder.path
    token_ids, targets = batch_of(session, session.step)

    console.print()
    console.print(say("demo.diagnose"), style="bold", highlight=False)
    diagnosis = diagnose(model, lambda: model.loss(token_ids, targets), optimizer=session.optimizers[0])
    console.print(diagnosis)
    add_report(path, session.step, diagnosis)

    console.print()
    console.print(say("demo.check"), style="bold", highlight=False)
    short = slice(None, 1), slice(None, CHECKED_TOKENS)
    check = check_gradients(
        model,
        lambda: model.loss(token_ids[short], targets[short]),
        progress=lambda done, total: display.progress("demo.check_bar", done, total),
    )
    display.end()
    console.print(check)
    add_report(path, session.step, check)

    step = near_step(session)
    console.print()
    console.print(say("demo.explain", step=step), style="bold", highlight=False)
    name = f"layers.{session.config.model.num_layers // 2}.ffn.w1.weight"
    replay_step(path, step, lambda *_: None)
    replay = Replay.open(path, step)
    assert replay is not None
    index = replay.matrix(name, "grad", height=1, width=1)["largest"]["index"]
    explain_command(console, path, step, name, ",".join(str(i) for i in index))


def near_step(session: TrainingSession) -> int:
    """The latest step that is the first after a checkpoint: one step to take again."""
    steps = [step_of(path) for path in checkpoints(session.folder.checkpoints)]
    return max((step + 1 for step in steps if step < session.step), default=session.step)
