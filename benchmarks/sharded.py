"""The gradient norm on two ranks: what a plain script prints, the true one, and what Clinometer shows.

    python -m benchmarks.sharded                              # starts two processes by itself
    torchrun --nproc-per-node 2 -m benchmarks.sharded         # the same

FSDP2 gives each rank a part of every gradient, and `p.grad.norm().item()` is the part's. Then the cost: the
same training with and without a watch, in turns, and how long a step's two vectors are on their way.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.optimizer import machine
from clinometer.monitoring.watch import watch
from clinometer.optim.clipping import clip_grad_norm_

IDS = torch.randint(0, 96, (8, 32), generator=torch.Generator().manual_seed(0))


class Totals:
    """A sink that keeps each step's total norm."""

    def __init__(self) -> None:
        self.totals: list[float] = []

    def step(self, step: int, time: float, scalars: dict[str, float], statistics: Any) -> None:
        self.totals.append(scalars["total_norm"])

    def _ignore(self, *_: Any) -> None: ...

    begin = tensors = histograms = alert = weights = event = close = _ignore


def model_of(width: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(4)]
    return nn.Sequential(nn.Embedding(96, width), *layers, nn.Linear(width, 96))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def plain_total(model: nn.Module) -> float:
    """What a script prints that knows nothing of shards."""
    return sum(float(_here(p.grad).norm()) ** 2 for p in model.parameters() if p.grad is not None) ** 0.5


def _here(grad: Any) -> Tensor:
    # `grad.norm().item()` of a DTensor is the norm of its part here.
    return grad.to_local() if hasattr(grad, "to_local") else grad


def sharded(width: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = model_of(width)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for part in model:  # pyright: ignore[reportGeneralTypeIssues]
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def demonstrate(rank: int, ranks: int, width: int) -> dict[str, float]:
    """The norms of the first step, by who tells them."""
    mine = IDS.chunk(ranks)[rank]
    model = sharded(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sink = Totals()
    watched = watch(model, optimizer, sink)
    loss_of(model, mine).backward()
    found = {"plain script": plain_total(model)}
    first = next(model.parameters()).grad
    assert first is not None
    found["p.grad.norm().item() of one tensor"] = float(_here(first).norm())
    found["clip_grad_norm_"] = float(clip_grad_norm_(model.parameters(), 1.0))
    optimizer.step()
    watched.close()
    found["watch"] = sink.totals[0] if sink.totals else float("nan")  # the first rank alone writes

    alone = model_of(width)
    loss_of(alone, IDS).backward()
    found["true"] = plain_total(alone)
    alone_first = next(alone.parameters()).grad
    assert alone_first is not None
    found["true, of that tensor"] = float(alone_first.norm())
    return found


def cost(rank: int, ranks: int, width: int, rounds: int) -> tuple[float, float]:
    """Medians of a step's seconds, without and with a watch, in turns."""
    times: dict[bool, list[float]] = {False: [], True: []}
    mine = IDS.chunk(ranks)[rank]
    runs = {}
    for watching in (False, True):
        model = sharded(width)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        runs[watching] = model, optimizer
        if watching:
            watch(model, optimizer, Totals())
    for _ in range(rounds):
        for watching, (model, optimizer) in runs.items():
            torch.distributed.barrier()
            begun = time.perf_counter()
            optimizer.zero_grad()
            loss_of(model, mine).backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            times[watching].append(time.perf_counter() - begun)
    warm = rounds // 4
    return statistics.median(times[False][warm:]), statistics.median(times[True][warm:])


def on_the_way(tensors: int, rounds: int) -> float:
    """Seconds for the vectors of one step over gloo, waited for; a watch does not wait."""
    vectors = torch.zeros(2 * tensors + 16).double(), torch.zeros(9 * tensors + 293).double()
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        for vector in vectors:
            torch.distributed.all_reduce(vector)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def main(rank: int, ranks: int, width: int, rounds: int) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, demonstrate(rank, ranks, width))
    without, watching = cost(rank, ranks, width, rounds) if rounds else (0.0, 0.0)
    small, large = on_the_way(300, 200), on_the_way(3000, 50)
    if rank == 0:
        print(machine())
        for name in found[0]:
            numbers = "  ".join(f"{facts[name]:.6f}" for facts in found if facts[name] == facts[name])
            print(f"{name:38s} {numbers}")
        if rounds:
            print(f"step {1e3 * without:.2f} ms, watched {1e3 * watching:.2f} ms: {watching / without:.3f}")
        print(
            f"two vectors over gloo, {ranks} ranks: {1e6 * small:.0f} µs for 300 tensors, "
            f"{1e6 * large:.0f} µs for 3000"
        )


def _spawned(rank: int, ranks: int, store: str, width: int, rounds: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    main(rank, ranks, width, rounds)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=60)
    given = parser.parse_args()
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
        world = torch.distributed.get_world_size()
        main(torch.distributed.get_rank(), world, given.width, given.rounds)
        torch.distributed.destroy_process_group()
    else:
        with tempfile.TemporaryDirectory() as folder:
            arguments = given.ranks, f"{folder}/store", given.width, given.rounds
            torch.multiprocessing.spawn(_spawned, arguments, nprocs=given.ranks)
