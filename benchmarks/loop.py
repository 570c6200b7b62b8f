"""What the training loop costs beside forward, backward and the optimizer's update.

    python -m benchmarks.loop --text FILE [--steps 12]

Three loops take the same steps of the same compiled model: a bare one (random batches, clipping by
torch.nn.utils), `clinometer train`'s without recording (`training.watch_every = 0`), and with it. Time
spent in the forward, the backward and the update is taken inside each loop and subtracted from that loop's
own wall time: steps vary by more than what is looked for. Validation, samples and checkpoints are left
out: they come as often as they are asked for.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows
from benchmarks.training_rows import loop_rows

MODELS = {
    "d 512, 4 layers, vocabulary 10,000, batch 16 x 256": (512, 16, 256, 10_000, 16),
    "d 256, 4 layers, vocabulary 4,096, batch 16 x 256": (256, 4, 256, 4_096, 16),
}


class Inside:
    """Seconds spent in what is wrapped."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - start

        return measured


class Between:
    """A display that notes the time and what was spent inside, at the end of every step; shows nothing."""

    def __init__(self, inside: Inside, shown: Any = None) -> None:
        self.inside, self.shown = inside, shown
        self.ends: list[tuple[float, float]] = []

    def step(self, row: dict[str, Any]) -> None:
        if self.shown is not None:
            self.shown.step(row)
        self.ends.append((time.perf_counter(), self.inside.seconds))

    def validation(self, *_: Any) -> None: ...
    def sample(self, *_: Any) -> None: ...
    def notice(self, *_: Any, **__: Any) -> None: ...
    def progress(self, *_: Any, **__: Any) -> None: ...


def overhead(ends: list[tuple[float, float]], warm: int = 3) -> tuple[float, float]:
    """Milliseconds a step outside of forward, backward and update, and milliseconds a step in all."""
    (begin, inside_begin), (end, inside_end) = ends[warm], ends[-1]
    steps = len(ends) - 1 - warm
    wall, inside = end - begin, inside_end - inside_begin
    return 1e3 * (wall - inside) / steps, 1e3 * wall / steps


def bare(session: Any, steps: int) -> list[tuple[float, float]]:
    """The loop of a tutorial, around the same model and optimizer."""
    inside = Inside()
    model, (optimizer,) = session.model, session.optimizers
    config = session.config
    size = (config.training.batch_size, config.model.context_length)
    loss_of, optimizer._update = inside.timed(model.loss), inside.timed(optimizer._update)
    backward = inside.timed(torch.Tensor.backward)
    ends = []
    for _ in range(steps):
        x, y = (torch.randint(0, model.config.vocab_size, size) for _ in range(2))
        with session.choices.autocast():
            loss = loss_of(x, y)
        backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        ends.append((time.perf_counter(), inside.seconds))
    return ends


def ours(session: Any, watched: bool) -> list[tuple[float, float]]:
    from rich.console import Console

    from clinometer.training.run.display import RunDisplay
    from clinometer.training.run.loop import Record, train
    from clinometer.training.run.recording import open_record

    inside = Inside()
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        shown = RunDisplay(Console(file=nowhere, force_terminal=True))
        shown.begin(
            step=0, steps=session.config.training.steps, tokens_per_step=4096, flops_per_token=1e8, peak=4e11
        )
        display = Between(inside, shown)
        session.model.loss = inside.timed(session.model.loss)
        (optimizer,) = session.optimizers
        optimizer._update = inside.timed(optimizer._update)
        backward, torch.Tensor.backward = torch.Tensor.backward, inside.timed(torch.Tensor.backward)
        try:
            record = open_record(session, display) if watched else Record()  # pyright: ignore
            outcome = train(session, display, record)  # pyright: ignore
            record.close(outcome)
        finally:
            torch.Tensor.backward = backward
            shown.end()
    return display.ends


def measure(text: Path, steps: int, path: Path | None = None) -> None:
    from clinometer.training.run import prepare
    from clinometer.training.settings.config import config_from

    for name, (width, heads, context, vocab_size, batch) in MODELS.items():
        print(f"\nLoop, {name} ({steps} steps each)")
        found: dict[str, float] = {}
        kept: dict[str, tuple[float, float]] = {}
        for kind in ("bare loop", "train, watch_every = 0", "train, watched"):
            watched = kind == "train, watched"
            with tempfile.TemporaryDirectory() as scratch:
                os.environ["CLINOMETER_CACHE"] = f"{scratch}/cache"
                config = config_from(
                    {
                        "model": {"d_model": width, "num_heads": heads, "context_length": context},
                        "data": {"corpus": str(text), "vocab_size": vocab_size},
                        "training": {
                            "steps": steps,
                            "batch_size": batch,
                            "compile": "on",
                            "eval_every": steps,
                            "eval_batches": 1,
                            "checkpoint_every": steps,
                            "sample_tokens": 0,
                            "watch_every": int(watched),
                        },
                    }
                )
                session = prepare.start(config, Path(scratch, "run"), Between(Inside()))
                ends = bare(session, steps) if kind == "bare loop" else ours(session, watched)
                session.close()
            found[kind], total = overhead(ends)
            kept[kind] = (found[kind], total)
            beyond = found[kind] - found["bare loop"]
            print(
                f"  {kind:24} {found[kind]:7.2f} ms of {total:7.1f} ms outside forward, backward, update"
                f"   ({100 * beyond / total:+.2f} % of the step beyond the bare loop)"
            )
        if name == next(iter(MODELS)):
            rows.keep(path, loop_rows(kept))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    rows.options(parser)
    arguments = parser.parse_args()
    measure(arguments.text, arguments.steps, arguments.json)
