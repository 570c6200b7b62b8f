"""How a watched training step grows: `python -m benchmarks.growth [--axes parameters,batch] [--rounds 3]`.

From one small model, each axis is taken alone to 4 and 16 times its size: parameters (the width), context,
batch, tensors (the layers). Every point is a process of its own, because a peak of memory is a property of a
process, and the points take turns over the rounds. A step is forward, backward, clipping, AdamW and
clinometer.watch on every tensor; memory is what the process came to hold beyond what a tiny model had already
made it load.

The exponent of an axis is the slope between its last two points, log(y₃/y₂) / log(x₃/x₂), where constant
costs no longer hide it: 1 is a straight line.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks import rows

BASE = {"width": 128, "layers": 2, "context": 64, "batch": 4}
AXES: dict[str, list[dict[str, int]]] = {
    "parameters": [{"width": 128}, {"width": 256}, {"width": 512}],
    "context": [{"context": 64}, {"context": 256}, {"context": 1024}],
    "batch": [{"batch": 4}, {"batch": 16}, {"batch": 64}],
    "tensors": [{"layers": 2}, {"layers": 8}, {"layers": 32}],
}
VOCABULARY = 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7, help="of each point, besides two that warm up")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    rows.options(parser)
    given = parser.parse_args()
    if given.point:
        print(json.dumps(measure(given.point, given.steps)))
        return
    axes = given.axes.split(",")
    if unknown := set(axes) - AXES.keys():
        parser.error(f"no axis is called {', '.join(sorted(unknown))}; there are {', '.join(AXES)}")

    points = {json.dumps({**BASE, **change}): change for axis in axes for change in AXES[axis]}
    found: dict[str, list[dict[str, float]]] = {point: [] for point in points}
    for turn in range(given.rounds):
        for point in points:
            command = [
                sys.executable,
                "-m",
                "benchmarks.growth",
                "--steps",
                str(given.steps),
                "--point",
                point,
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[point].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"\rround {turn + 1}/{given.rounds}  {point:<70}", end="", flush=True)
    print("\r" + " " * 90)
    kept = []
    for axis in axes:
        steps = [found[json.dumps({**BASE, **change})] for change in AXES[axis]]
        for measured, unit in (("time", "ms"), ("memory", "MB")):
            curve = [(one[0][axis], statistics.median(each[measured] for each in one)) for one in steps]
            slopes = exponents(steps, axis, measured)
            kept.append(rows.alone(f"growth-{axis}-{measured}", slopes, "exponent", points=curve))
            said = "   ".join(f"{size:>9,.0f}: {value:>8,.1f} {unit}" for size, value in curve)
            print(f"{axis:<11}{measured:<8}{said}   exponent {kept[-1].ours:.2f}, whole {slope(curve):.2f}")
    rows.keep(given.json, kept)


def exponents(steps: list[list[dict[str, float]]], axis: str, measured: str) -> list[float]:
    """The slope between the last two points, in each round."""
    last_two = zip(steps[-2], steps[-1], strict=True)
    return [slope([(a[axis], a[measured]), (b[axis], b[measured])]) for a, b in last_two]


def slope(curve: list[tuple[float, float]]) -> float:
    """The exponent between a curve's ends, log(y₁/y₀) / log(x₁/x₀)."""
    (x0, y0), (x1, y1) = curve[0], curve[-1]
    return math.log(y1 / y0) / math.log(x1 / x0)


def measure(point: dict[str, int], steps: int) -> dict[str, float]:
    """In this process: the median time of a step in ms, the memory it came to need in MB, and the sizes."""
    train({"width": 32, "layers": 1, "context": 8, "batch": 1}, 2)  # loads what torch loads when first needed
    before = peak_megabytes()
    times, sizes = train(point, steps + 2)
    memory = peak_megabytes() - before
    return {"time": 1e3 * statistics.median(times[2:]), "memory": memory, **sizes}


def train(point: dict[str, int], steps: int) -> tuple[list[float], dict[str, Any]]:
    """Seconds of each watched step, and how large the point is on every axis."""
    import torch

    from benchmarks.watching import Nowhere
    from clinometer.lm.model import TransformerLM
    from clinometer.lm.transformer_config import TransformerConfig
    from clinometer.monitoring.watch import watch
    from clinometer.optim.adamw import AdamW
    from clinometer.optim.clipping import clip_grad_norm_

    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=VOCABULARY,
        context_length=point["context"],
        d_model=point["width"],
        num_layers=point["layers"],
        num_heads=point["width"] // 32,
        d_ff=point["width"] * 8 // 3 // 8 * 8,
    )
    model = TransformerLM(config)
    optimizer = AdamW(model.parameters(), lr=1e-4)
    watching = watch(model, optimizer, to=Nowhere())
    token_ids = torch.randint(VOCABULARY, (point["batch"], point["context"]))
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        model.loss(token_ids, token_ids.roll(-1, 1)).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    watching.close()
    weights = [p for p in model.parameters() if p.ndim == 2]
    sizes = {"parameters": sum(p.numel() for p in weights), "tensors": len(list(model.parameters()))}
    return times, {**sizes, "context": point["context"], "batch": point["batch"]}


def peak_megabytes() -> float:
    """The most memory this process has held so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


if __name__ == "__main__":
    main()
