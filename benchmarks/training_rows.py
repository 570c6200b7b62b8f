"""From what `benchmarks.training` and `benchmarks.loop` measured to the rows of the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.rows import Row, paired

Runs = Sequence[tuple[float, float]]
"""(seconds, validation loss) of each whole process."""


def race_rows(target: float, nanogpt: Runs, cold: Runs, warm: Runs = (), long: Runs = ()) -> list[Row]:
    """Time to the loss with cold and warm caches, and the loss after nanoGPT's own time (`long`).

    A race in which one run ended above the target loss was not won in any time: it has no row.
    """
    found = []
    for name, runs in (("loss-cold", cold), ("loss-warm", warm)):
        if runs and max(loss for _, loss in runs) <= target:
            found.append(paired(name, "nanoGPT", _column(runs, 0), _column(nanogpt, 0), "s"))
    if long and all(ours[0] <= theirs[0] for ours, theirs in zip(long, nanogpt, strict=True)):
        found.append(paired("loss-same-time", "nanoGPT", _column(long, 1), _column(nanogpt, 1), "loss"))
    return found


def speed_rows(results: Mapping[str, Sequence[Mapping[str, float]]], operations_a_token: float) -> list[Row]:
    """Tokens a second beside nanoGPT, and the bf16 step's arithmetic beside this machine's own product."""

    def speeds(side: str) -> list[float]:
        return [one["tokens_per_second"] for one in results[side]]

    best = max(("nanoGPT eager", "nanoGPT compiled"), key=lambda side: statistics.median(speeds(side)))
    bf16 = "clinometer bf16"
    arithmetic = [speed * operations_a_token / 1e12 for speed in speeds(bf16)]
    reachable = [done / one["matmul_share"] for done, one in zip(arithmetic, results[bf16], strict=True)]
    return [
        paired("speed-float32", best, speeds("clinometer float32"), speeds(best), "tokens/s"),
        paired("speed-bf16", best, speeds(bf16), speeds(best), "tokens/s"),
        paired(
            "speed-bf16-bf16",
            "nanoGPT bf16 compiled",
            speeds(bf16),
            speeds("nanoGPT bf16 compiled"),
            "tokens/s",
        ),
        paired("matmul-share", "one 2048³ product", arithmetic, reachable, "TFLOP/s"),
    ]


def memory_rows(gigabytes: Mapping[str, float]) -> list[Row]:
    """Peak memory in float32, the precision that nanoGPT has too, and in bf16, compiled."""
    peer = "nanoGPT eager"
    sides = {
        "memory": "clinometer float32",
        "memory-bf16": "clinometer bf16 compiled",
        "memory-parts": "clinometer in parts",
    }
    return [
        paired(name, peer, [gigabytes[side]], [gigabytes[peer]], "GB")
        for name, side in sides.items()
        if side in gigabytes
    ]


def loop_rows(milliseconds: Mapping[str, tuple[float, float]]) -> list[Row]:
    """The step of each loop beside what it would take with the bare loop's overhead.

    `milliseconds` holds (outside of forward, backward and update; in all) of each kind of loop. The parts
    inside vary by more than the overhead, so each kind is compared with its own inside plus the bare outside.
    """
    bare, _ = milliseconds["bare loop"]
    sides = {"loop": "train, watch_every = 0", "loop-watched": "train, watched"}
    found = []
    for name, kind in sides.items():
        outside, whole = milliseconds[kind]
        found.append(paired(name, "a bare loop", [whole / 1e3], [(whole - outside + bare) / 1e3], "s"))
    return found


def _column(runs: Runs, index: int) -> list[float]:
    return [run[index] for run in runs]
