"""AdamW's step and the gradient norm beside torch's.

    python -m benchmarks.optimizer [--params 20e6]
    python -m benchmarks.optimizer --gpt2            124 M weights in GPT-2's 148 shapes, the step only

The contenders take turns (A B C … A B C …) on the same weights and gradients, each with its own state, so
that what else the machine does hits all of them; the table gives medians, and the median of the rounds'
ratios. A step reads θ, g, m, v and writes θ, m, v: 28 bytes a float32 parameter, which makes GB/s. Its
limit is those 28 bytes at the speed of a copy of as many weights, which takes turns with the others.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import rows
from clinometer.optim.adamw import AdamW
from clinometer.optim.clipping import gradient_norms

_BYTES_OF_A_STEP = 28
_BYTES_OF_A_NORM = 4
_BYTES_OF_A_COPY = 8


def language_model(parameters: float) -> list[torch.nn.Parameter]:
    """About `parameters` weights, in a language model's shapes: in each block, two small vectors."""
    shapes: list[tuple[int, ...]] = [(10_000, 512), (10_000, 512), (512,)]
    block: list[tuple[int, ...]] = [(512,), (512,), *[(512, 512)] * 4, (1344, 512), (1344, 512), (512, 1344)]
    size = sum(torch.Size(shape).numel() for shape in block)
    rest = parameters - sum(torch.Size(shape).numel() for shape in shapes)
    shapes += block * max(1, round(rest / size))
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
    for weight in weights:
        weight.grad = 1e-3 * torch.randn(weight.shape, generator=generator)
    return weights


def gpt2() -> list[torch.nn.Parameter]:
    """GPT-2's 124 M weights in its 148 tensors, two thirds of them vectors."""
    vectors = [768, 768, 2304, 768, 768, 768, 3072, 768]
    matrices = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    block: list[tuple[int, ...]] = [*[(size,) for size in vectors], *matrices]
    weights = [
        torch.nn.Parameter(torch.full(shape, 0.02))
        for shape in [(50_257, 768), (1_024, 768), *block * 12, (768,), (768,)]
    ]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)
    return weights


def interleaved(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, without the first two rounds, which fill caches and state."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(title: str, seconds: dict[str, list[float]], peer: str, traffic: float) -> str:
    ours = next(iter(seconds))
    lines = [f"{title:<34}{'median ms':>10}{'GB/s':>8}{'ours / it':>11}"]
    for name, times in seconds.items():
        median = statistics.median(times)
        ratio = statistics.median(a / b for a, b in zip(seconds[ours], times, strict=True))
        mark = "  <- peer" if name == peer else ""
        lines.append(f"{name:<34}{median * 1e3:>10.2f}{traffic / median / 1e9:>8.1f}{ratio:>11.2f}{mark}")
    return "\n".join(lines)


def machine() -> str:
    """Processor, threads and torch, in one line."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        processor = names[0] if names else processor
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer")
    parser.add_argument("--params", type=float, default=20e6)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--slow-rounds", type=int, default=5, help="rounds with the single-tensor forms")
    parser.add_argument("--gpt2", action="store_true")
    rows.options(parser)
    arguments = parser.parse_args()

    weights = gpt2() if arguments.gpt2 else language_model(arguments.params)
    count = sum(weight.numel() for weight in weights)
    print(machine())
    print(f"{count / 1e6:.1f} M parameters in {len(weights)} tensors\n")
    source, target = torch.ones(count), torch.empty(count)

    steps: dict[str, Callable[[], object]] = {
        "clinometer AdamW": AdamW(weights).step,
        "torch AdamW fused": torch.optim.AdamW(weights, fused=True).step,
        "a copy of the weights": lambda: target.copy_(source),
    }
    if not arguments.gpt2:
        steps["torch AdamW foreach"] = torch.optim.AdamW(weights, foreach=True).step
    traffic = _BYTES_OF_A_STEP * count
    seconds = interleaved(steps, arguments.rounds)
    copy = seconds.pop("a copy of the weights")
    print(table("one step", seconds, "torch AdamW fused", traffic))
    bandwidth = _BYTES_OF_A_COPY * count / statistics.median(copy)
    for name in ("clinometer AdamW", "torch AdamW fused"):
        pairs = zip(copy, seconds[name], strict=True)
        share = statistics.median(traffic / (_BYTES_OF_A_COPY * count) * c / s for c, s in pairs)
        print(f"{name}: {share:.0%} of a copy's {bandwidth / 1e9:.1f} GB/s")
    print()
    name = "adamw-124m" if arguments.gpt2 else "adamw-20m"
    ours, fused = seconds["clinometer AdamW"], seconds["torch AdamW fused"]
    moved = [traffic / s / 1e9 for s in ours]
    copied = [_BYTES_OF_A_COPY * count / s / 1e9 for s in copy]
    if arguments.gpt2 or arguments.params == 20e6:
        rows.keep(
            arguments.json,
            [
                rows.paired(name, "torch AdamW fused", ours, fused, "s"),
                rows.paired(f"{name}-bandwidth", "a copy of the weights", moved, copied, "GB/s"),
            ],
        )
    if arguments.gpt2:
        return

    slow: dict[str, Callable[[], object]] = {
        "clinometer AdamW, reference": AdamW(weights, fused=False).step,
        "torch AdamW single-tensor": torch.optim.AdamW(weights, foreach=False).step,
    }
    seconds = interleaved(slow, arguments.slow_rounds)
    print(table("one step, readable", seconds, "torch AdamW single-tensor", traffic), "\n")

    grads = [weight.grad for weight in weights if weight.grad is not None]
    norms: dict[str, Callable[[], object]] = {
        "clinometer gradient_norms": lambda: gradient_norms(weights),
        "torch get_total_norm": lambda: torch.nn.utils.get_total_norm(grads),
    }
    seconds = interleaved(norms, arguments.rounds)
    print(table("all gradient norms", seconds, "torch get_total_norm", _BYTES_OF_A_NORM * count))


if __name__ == "__main__":
    main()
