"""What a watch costs at sizes nobody has here: `python -m benchmarks.scale` prints docs/*/scale.md's table.

Arithmetic, and nothing else: no process is started, no number below is a measurement of a large run. What was
measured (on two cores and two gloo ranks; docs/log.md has the dates) and what is assumed stands apart.
"""

from __future__ import annotations

from dataclasses import dataclass

# Measured.
ROW_BYTES = 41.8
"""Run file, a tensor and step, roll-ups included (300 tensors × 8 statistics, 2,048 steps)."""
HISTOGRAM_BYTES = 11.1
"""Run file, a tensor and step: three histograms every 16 steps, compressed."""
HOP_SECONDS = 130e-6
"""One message of gloo's between two processes of one busy machine: a step's two vectors of 300 tensors, which
are four messages, took 519 µs at the least."""

# Counted in the code.
STATE_BYTES = 16
"""A parameter's float32 weight, gradient and AdamW's two moments."""
COPY_BYTES = 4
"""A parameter's copy from before the step, which a watch keeps."""
READ_BYTES = 86
"""Read and written for a parameter by the kernels of monitoring/measure/device.py in a measured step."""
SUMS, MAXIMA, EXTRA = 9, 2, 309
"""Float64 numbers a tensor in the two vectors of a step, and those for the step as a whole."""

# Assumed.
HBM_BYTES = 3.35e12 * 0.8
"""Memory of an H100 SXM by its maker, a second; four fifths of it reached."""
FLOPS = 989e12 * 0.4
"""Its dense bfloat16 by its maker; 40 % of it reached."""
TOKENS = 4096
"""A step's tokens on each GPU."""
MEMORY = 80e9
NETWORK_HOP = HOP_SECONDS
"""The same message between machines."""
RUN_STEPS = 100_000


@dataclass(frozen=True)
class Model:
    name: str
    parameters: float
    tensors: int
    """Nine a layer and three: 24, 80 and 120 layers."""


MODELS = (Model("1 B", 1e9, 219), Model("70 B", 70e9, 723), Model("1 T", 1e12, 1083))
GPUS = (8, 512, 16384)


def step_seconds(model: Model) -> float:
    """6 floating-point operations a parameter and token; all else hidden behind them."""
    return 6 * model.parameters * TOKENS / FLOPS


def reading_seconds(model: Model, gpus: int) -> float:
    return model.parameters / gpus * READ_BYTES / HBM_BYTES


def vector_bytes(model: Model) -> int:
    return 8 * ((SUMS + MAXIMA) * model.tensors + EXTRA)


def exchange_seconds(gpus: int) -> float:
    """Two rings of 2 (P − 1) messages; their size, some kilobytes, is nothing beside their number."""
    hop = HOP_SECONDS if gpus <= 8 else NETWORK_HOP
    return 2 * 2 * (gpus - 1) * hop


def file_bytes(model: Model) -> float:
    return (ROW_BYTES + HISTOGRAM_BYTES) * model.tensors * RUN_STEPS


def table() -> str:
    """The page's table: the columns are explained there."""
    lines = [
        "| N | GPUs | state | copy | step | reading | share | vectors | exchange | file |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for model in MODELS:
        for gpus in GPUS:
            state = STATE_BYTES * model.parameters / gpus
            copy = COPY_BYTES * model.parameters / gpus
            reading, step = reading_seconds(model, gpus), step_seconds(model)
            mark = " ✗" if state + copy > MEMORY else ""
            sent = exchange_seconds(gpus)
            late = " ▲" if sent > step else ""
            lines.append(
                f"| {model.name} | {gpus:,} | {gigabytes(state)}{mark} | {gigabytes(copy)} | {seconds(step)} "
                f"| {seconds(reading)} | {100 * reading / step:.2g} % | {vector_bytes(model) / 1e3:.0f} kB "
                f"| {seconds(sent)}{late} | {file_bytes(model) / 1e9:.1f} GB |"
            )
    return "\n".join(lines)


def gigabytes(value: float) -> str:
    if value >= 1e12:
        return f"{value / 1e12:.3g} TB"
    return f"{value / 1e9:.3g} GB" if value >= 1e8 else f"{value / 1e6:.3g} MB"


def seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.3g} s"
    return f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} µs"


if __name__ == "__main__":
    print(table())
