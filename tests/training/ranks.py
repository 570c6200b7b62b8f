"""What each rank does in test_parallel.py: `python -m tests.training.ranks FOLDER`, once for each rank."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from clinometer.distributed.launch import launched
from clinometer.optim.make_optimizers import make_optimizers
from clinometer.training.ranks.world import World
from clinometer.training.run import prepare
from clinometer.training.run.loop import Outcome, train
from clinometer.training.run.session import TrainingSession
from clinometer.training.settings.config import OptimConfig, RunConfig
from tests.training.conftest import Silent, small_config

OPTIMIZERS = {
    "adamw": OptimConfig(lr=1e-2, max_norm=0.5),
    "sgd": OptimConfig(name="sgd", lr=0.3, momentum=0.9, max_norm=0.5),
    "muon": OptimConfig(name="muon", lr=1e-2, max_norm=0.5),
}


def configured(folder: Path, optimizer: str, **training) -> RunConfig:
    """Twenty clipped steps, a validation, a sample and checkpoints among them; text of `folder`."""
    config = small_config(folder / "corpus.txt", **({"sample_every": 20, "keep": 3} | training))
    return replace(config, optim=OPTIMIZERS[optimizer])


def whole_run(config: RunConfig, path: Path, world: World | None = None, spoilt: int | None = None) -> list:
    """The rows of a new run; with `spoilt`, the last rank's loss is not a number in that step."""
    display = Silent()
    session = begun(config, path, display, world)
    if spoilt is not None:
        spoil(session, spoilt)
    return finished(session, display)


def resumed(path: Path, world: World | None = None, **changed) -> list:
    display = Silent()
    if world is None or world.first:
        session = prepare.resume(path, None, display, world)
    else:
        session = prepare.attend(display, world)
    return finished(session, display)


def begun(config: RunConfig, path: Path, display: Silent, world: World | None) -> TrainingSession:
    if world is None or world.first:
        return prepare.start(config, path, display, world)
    return prepare.attend(display, world)


def finished(session: TrainingSession, display: Silent) -> list:
    assert train(session, display) is Outcome.DONE
    session.close()
    return [[r["loss"], r["grad_norm"], r["taken"]] for r in display.rows] + [
        [loss] for _, loss, _ in display.validations
    ]


def stopped_at(step: int, config: RunConfig, path: Path, world: World, who: int) -> int:
    """Start a run, have rank `who` asked to stop during `step`; returns the step it stopped at."""
    display = Silent()

    def ask(row, keep=display.step):
        keep(row)
        if row["step"] == step - 1 and world.rank == who:
            os.kill(os.getpid(), 15)

    display.step = ask
    session = begun(config, path, display, world)
    assert train(session, display) is Outcome.TERMINATED
    session.close()
    return session.step


def spoil(session: TrainingSession, step: int) -> None:
    original = session.model.loss

    def loss(*arguments, **options):
        value = original(*arguments, **options)
        last = session.world.rank == session.world.size - 1
        return value * float("nan") if session.step + 1 == step and last and value.requires_grad else value

    session.model.loss = loss


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, in units of the last place of the larger of the two."""
    size = torch.maximum(a.abs(), b.abs())
    unit = torch.nextafter(size, torch.tensor(torch.inf)) - size
    return float(((a - b).abs() / unit).max())


def updates_apart(name: str, world: World) -> list[float]:
    """How far three updates of sharded tensors by given gradients are from those of whole ones, in ulp.

    Where a tensor ends, torch's kernel takes its last entries one by one, which rounds otherwise than
    sixteen at once: a part ends elsewhere than the whole.
    """
    from torch.distributed.tensor import Shard, distribute_tensor

    shapes = [(7, 5), (7, 5), (7, 5), (5, 9), (1, 4), (300, 70), (6,), (1,)]
    generator = torch.Generator().manual_seed(0)
    values, *grads = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4))
    plain = [torch.nn.Parameter(value.clone()) for value in values]
    split = [torch.nn.Parameter(distribute_tensor(v.clone(), world.mesh, [Shard(0)])) for v in values]
    names = [f"layers.{i}.w" for i in range(len(shapes))]
    optimizers = [
        make_optimizers(zip(names, held, strict=True), name=name, lr=0.1, momentum=0.9)
        for held in (plain, split)
    ]
    for step in grads:
        for held in (plain, split):
            for parameter, grad in zip(held, step, strict=True):
                whole = held is plain
                parameter.grad = grad.clone() if whole else distribute_tensor(grad, world.mesh, [Shard(0)])
        for optimizer in [*optimizers[0], *optimizers[1]]:
            optimizer.step()
    return [apart(a.detach(), b.detach().full_tensor()) for a, b in zip(plain, split, strict=True)]


def main(folder: Path, world: World) -> dict:
    told: dict = {"losses": {}}
    runs = folder / "ranks"
    for name in OPTIMIZERS:
        for kind in ("fsdp", "ddp") if name == "adamw" else ("fsdp",):
            config = configured(folder, name, parallel=kind)
            told["losses"][f"{kind}-{name}"] = whole_run(config, runs / f"{kind}-{name}", world)
    # Five windows on W ranks, two at a time: a rank fills in. Recomputed, and written beside the training.
    odd = {"batch_size": 5, "micro_batch_size": 1}
    config = configured(folder, "adamw", **odd, activation_checkpointing=True, async_checkpoints=True)
    told["losses"]["odd"] = whole_run(config, runs / "odd", world)
    config = configured(folder, "adamw", precision="bfloat16")
    told["losses"]["bfloat16"] = whole_run(config, runs / "bfloat16", world)
    config = configured(folder, "adamw", parallel="ddp", micro_batch_size=1, batch_size=8)
    told["losses"]["ddp-parts"] = whole_run(config, runs / "ddp-parts", world)

    told["losses"]["spoilt"] = whole_run(configured(folder, "adamw"), runs / "spoilt", world, spoilt=4)

    told["updates"] = {name: updates_apart(name, world) for name in OPTIMIZERS}
    for name in OPTIMIZERS:
        path = runs / f"stopped-{name}"
        config = configured(folder, name)
        told[f"stopped-{name}"] = stopped_at(9, config, path, world, who=world.size - 1)
        told["losses"][f"resumed-{name}"] = resumed(path, world)
    # A run that one process began, and one that has been stopped for one process to end.
    told["losses"]["from-one"] = resumed(folder / "one" / "to-ranks", world)
    told["stopped-to-one"] = stopped_at(9, configured(folder, "muon"), runs / "to-one", world, who=0)
    return told


def ranks_of(
    size: int, arguments: list[str], folder: Path, port: int | None = None, **options
) -> list[subprocess.Popen[str]]:
    """`python -m arguments` on each of `size` ranks, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = port or free.getsockname()[1]
    found = []
    for rank in range(size):
        given = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        given |= {"COLUMNS": "300", "CLINOMETER_CACHE": str(folder / "cache"), "CLINOMETER_LANG": "en"}
        found.append(
            subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env={**os.environ, **given},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                **options,
            )
        )
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    here, place = Path(sys.argv[1]), World(launched())
    with place.guarded():
        found = main(here, place)
        (here / f"{place.rank}.json").write_text(json.dumps(found))
        place.leave()
