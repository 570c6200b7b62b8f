"""What watching costs: `python -m benchmarks.watching [--shape large] [--wandb] [--tensorboard] [--cockpit]`.

Copies of one model train side by side on the same batches, taking turns step by step (A B C A B C …), so that
what else the machine does hits all of them; the table gives medians, and the median of the rounds' ratios to
the run that nobody watches. A round in sixteen writes histograms; the table shows the mean over rounds, too,
because a median would hide them. The sink throws everything away: writing is measured by the recorder's own.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import rows
from benchmarks.optimizer import machine
from clinometer.lm.model import TransformerLM
from clinometer.lm.transformer_config import TransformerConfig
from clinometer.monitoring.watch import watch
from clinometer.optim.adamw import AdamW
from clinometer.optim.clipping import clip_grad_norm_

SHAPES: dict[str, tuple[dict[str, int], int]] = {
    "large": (
        {
            "d_model": 512,
            "num_layers": 4,
            "num_heads": 16,
            "d_ff": 1344,
            "context_length": 256,
            "vocab_size": 10_000,
        },
        16,
    ),
    "small": (
        {
            "d_model": 128,
            "num_layers": 4,
            "num_heads": 4,
            "d_ff": 344,
            "context_length": 64,
            "vocab_size": 256,
        },
        12,
    ),
}


PEERS = {
    "wandb": "wandb.watch(log='all')",
    "tensorboard": "TensorBoard histograms",
    "cockpit": "Cockpit",
}


class Nowhere:
    """A sink that keeps nothing."""

    def begin(self, run: dict[str, Any]) -> None: ...
    def tensors(self, tensors: list[dict[str, Any]]) -> None: ...
    def step(self, step: int, time: float, scalars: dict[str, float], statistics: Any) -> None: ...
    def histograms(self, step: int, counts: Any) -> None: ...
    def alert(self, alert: dict[str, Any]) -> None: ...
    def weights(self, step: int, rows: list[dict[str, Any]]) -> None: ...
    def event(self, step: int, time: float, kind: str, data: dict[str, Any]) -> None: ...
    def close(self, state: str) -> None: ...


class Runner:
    """One copy of the model, and what happens after each of its steps."""

    def __init__(self, model: nn.Module, after: Callable[[int], None] = lambda step: None) -> None:
        self.model = model
        self.optimizer = AdamW(model.parameters(), lr=1e-4)
        self.after = after
        self.backward: Callable[[torch.Tensor], None] = torch.Tensor.backward
        self.count = 0

    def step(self, token_ids: torch.Tensor, targets: torch.Tensor) -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.model.loss(token_ids, targets)  # pyright: ignore[reportCallIssue]
        self.backward(loss)
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1
        self.after(self.count)
        return time.perf_counter() - start


def with_wandb(model: nn.Module, folder: str) -> tuple[Any, Callable[[int], None]]:
    import wandb

    run = wandb.init(mode="offline", dir=folder, project="watching", settings=wandb.Settings(console="off"))
    run.watch(model, log="all", log_freq=1)
    return run.finish, lambda step: run.log({"step": step})


def with_tensorboard(model: nn.Module, folder: str) -> tuple[Any, Callable[[int], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)
    grads: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: grads.__setitem__(name, p.grad.detach().clone())
        )

    def write(step: int) -> None:
        for name, parameter in model.named_parameters():
            writer.add_histogram(name, parameter, step)
            writer.add_histogram(f"{name}.grad", grads[name], step)

    return writer.close, write


def with_cockpit(runner: Runner) -> None:
    """Those of Cockpit's instruments that run here: the others ask BackPACK for the gradient of every single
    sample, which it does not find in this model, and its update size fails with this torch."""
    from cockpit import Cockpit, quantities

    chosen = [kind(lambda step: True) for kind in (quantities.Distance, quantities.GradNorm, quantities.Loss)]
    cockpit = Cockpit(runner.model.parameters(), quantities=chosen)

    def backward(loss: torch.Tensor) -> None:
        facts = {"batch_size": 1, "individual_losses": loss.detach()[None], "loss": loss.detach()}
        with cockpit(runner.count, info={**facts, "optimizer": runner.optimizer}):
            loss.backward(create_graph=cockpit.create_graph(runner.count))

    runner.backward = backward


def measure(shape: str, rounds: int, peers: list[str]) -> dict[str, list[float]]:
    sizes, batch = SHAPES[shape]
    torch.manual_seed(0)
    model = TransformerLM(TransformerConfig(**sizes))
    count = sum(p.numel() for p in model.parameters())
    runners = {
        "nobody watches": Runner(copy.deepcopy(model)),
        "clinometer.watch": Runner(copy.deepcopy(model)),
    }
    ends: list[Callable[[], None]] = []
    with tempfile.TemporaryDirectory() as folder:
        for peer, attach in (
            ("wandb.watch(log='all')", with_wandb),
            ("TensorBoard histograms", with_tensorboard),
        ):
            if peer.split(".")[0].split()[0].lower() in peers:
                runner = Runner(copy.deepcopy(model))
                end, runner.after = attach(runner.model, folder)
                runners[peer] = runner
                ends.append(end)
        if "cockpit" in peers:
            runners["Cockpit"] = Runner(copy.deepcopy(model))
            with_cockpit(runners["Cockpit"])
        watched = runners["clinometer.watch"]
        watching = watch(watched.model, watched.optimizer, to=Nowhere())
        ends.append(watching.close)
        seconds: dict[str, list[float]] = {name: [] for name in runners}
        for turn in range(rounds + 2):
            token_ids = torch.randint(sizes["vocab_size"], (batch, sizes["context_length"]))
            order = list(runners) if turn % 2 == 0 else list(runners)[::-1]
            for name in order:
                taken = runners[name].step(token_ids, token_ids.roll(-1, 1))
                if turn >= 2:  # the first two fill caches, optimizer state and the watch's memory
                    seconds[name].append(taken)
        for end in ends:
            end()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{shape}: {count / 1e6:.1f} M weights, batch {batch} x {sizes['context_length']}; load {load:.1f}")
    base = seconds["nobody watches"]
    print(f"{'':<26}{'median ms':>11}{'ratio, median':>15}{'ratio, mean':>13}")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, base, strict=True))
        mean = sum(times) / sum(base)
        print(f"{name:<26}{statistics.median(times) * 1e3:>11.1f}{ratio:>15.3f}{mean:>13.3f}")
    print(flush=True)
    return seconds


def sixteens(seconds: list[float]) -> list[float]:
    """Means of each sixteen steps in a row (of all, if they are fewer), so that each holds one histogram."""
    whole = range(0, len(seconds) - 15, 16) or [0]
    return [statistics.fmean(seconds[start : start + 16]) for start in whole]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=32)
    parser.add_argument("--shape", choices=[*SHAPES, "both"], default="both")
    parser.add_argument("--wandb", action="store_true")
    parser.add_argument("--tensorboard", action="store_true")
    parser.add_argument("--cockpit", action="store_true", help="pip install cockpit-for-pytorch")
    rows.options(parser)
    arguments = parser.parse_args()
    wanted = [name for name in PEERS if getattr(arguments, name)]
    peers = [name for name in wanted if importlib.util.find_spec(name)]
    print(f"{machine()}\n")
    for shape in SHAPES if arguments.shape == "both" else [arguments.shape]:
        seconds = measure(shape, arguments.rounds, peers)
        base = seconds.pop("nobody watches")
        names = {label: f"-{peer}" for peer, label in PEERS.items()} | {"clinometer.watch": ""}
        found = [
            rows.paired(f"watch-{shape}{names[label]}", "not watched", sixteens(taken), sixteens(base), "s")
            for label, taken in seconds.items()
        ]
        absent = {f"watch-{shape}-{peer}": PEERS[peer] for peer in wanted if peer not in peers}
        rows.keep(arguments.json, found, absent)


if __name__ == "__main__":
    main()
