"""Run files of any size that look like a language model's, made fast: for tests of reader and page.

synthetic(folder, steps=100_000, layers=42)      # about 300 tensors
python -m tests.record.synthetic FOLDER --steps 100000 --layers 42
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np

from clinometer.record.format import histogram_codec, windows
from clinometer.record.write.recorder import Recorder
from clinometer.vocabulary import STATISTICS

KINDS = (
    ("attn.q_proj", (256, 256)),
    ("attn.k_proj", (256, 256)),
    ("attn.v_proj", (256, 256)),
    ("attn.output_proj", (256, 256)),
    ("ffn.w1", (688, 256)),
    ("ffn.w2", (256, 688)),
    ("ffn.w3", (688, 256)),
)
STARTED = 1_790_000_000.0
SECONDS = 0.25
"""Of one step."""


def tensor_list(layers: int) -> list[dict]:
    """7 tensors a layer, an embedding before and a head after them."""
    named = [("token_embeddings.weight", (8192, 256), None, "token_embeddings")]
    for layer in range(layers):
        named += [(f"layers.{layer}.{kind}.weight", shape, layer, kind) for kind, shape in KINDS]
    named.append(("lm_head.weight", (8192, 256), None, "lm_head"))
    return [
        {
            "id": number,
            "name": name,
            "shape": list(shape),
            "dtype": "float32",
            "numel": math.prod(shape),
            "group": 0,
            "layer": layer,
            "kind": kind,
            "position": number,
        }
        for number, (name, shape, layer, kind) in enumerate(named)
    ]


def statistics_of(steps: np.ndarray, tensors: int, rng: np.random.Generator, total: int) -> np.ndarray:
    """(n, T, 8): norms fall like 1/√step, one tensor dies, one is frozen, one step is not finite."""
    n = len(steps)
    depth = np.linspace(0.5, 2.0, tensors, dtype=np.float32)
    decay = (1.0 / np.sqrt(1.0 + steps / 50.0)).astype(np.float32)[:, None]
    noise = 1 + 0.2 * rng.standard_normal((n, tensors), dtype=np.float32)
    norm = np.abs(depth * decay * noise)
    out = np.empty((n, tensors, len(STATISTICS)), dtype=np.float32)
    out[..., 0] = norm
    out[..., 1] = norm / 20
    out[..., 2] = 0
    out[:, 0, 2] = 0.9
    out[..., 3] = 0
    out[..., 4] = 15 + steps[:, None] / total
    out[..., 5] = 1e-3 * noise
    out[..., 6] = 0.3 + 0.1 * noise
    out[..., 7] = norm / 2
    if tensors > 4:
        out[:, 3, :4] = np.nan  # frozen: it never has a gradient
        out[:, 3, 6] = np.nan
        dead = steps > total // 2
        out[dead, 4, :2] = 0
        out[dead, 4, 2] = 1
    out[steps == total // 3, -1, 0] = np.inf
    out[steps == total // 3, -1, 3] = 7
    return out


def scalars_of(step: int, total: int, noise: float) -> dict[str, float]:
    loss = 1.5 + 7.5 * math.exp(-5 * step / total) + 0.05 * noise
    norm = 1.2 / math.sqrt(1 + step / 50) * (1 + 0.1 * noise)
    scalars = {
        "loss": loss,
        "lr": 3e-4 * min(1.0, 20 * step / total),
        "total_norm": norm,
        "clip": min(1.0, 1.0 / norm),
        "max_norm": 1.0,
        "before_clipping": 1.0,
        "tokens": 4096.0,
        "seconds": SECONDS * (1 + 0.05 * noise),
        "memory": 1.5e9,
        "taken": 1.0,
    }
    if step == total // 3:
        scalars["taken"] = 0.0
    if step % 250 == 0 or step == total:
        scalars["validation_loss"] = loss + 0.1
    return scalars


def synthetic(
    folder: Path,
    steps: int = 2000,
    layers: int = 4,
    *,
    state: str = "done",
    seed: int = 0,
    pins: int = 1,
    name: str = "synthetic",
) -> Path:
    """Record `steps` steps (1 to `steps`) of 2 + 7·`layers` tensors in `folder`, and return it.

    `state`: "done", "stopped", "failed", "live" (this very process) or "crashed".
    """
    rng = np.random.default_rng(seed)
    recorder = Recorder(folder)
    tensors = tensor_list(layers)
    recorder.begin(
        {
            "name": name,
            "started": STARTED,
            "config": {"model": {"num_layers": layers, "d_model": 256}, "optim": {"lr": 3e-4}},
            "environment": {"python": "3.12.0", "packages": {"torch": "2.13.0"}},
            "statistics": list(STATISTICS),
            "every": 1,
            "model": "TransformerLM",
            "optimizers": ["AdamW"],
        }
    )
    recorder.tensors(tensors)
    connection = recorder._file.connection
    connection.execute("PRAGMA synchronous = OFF")
    for begin in range(1, steps + 1, 2048):
        numbers = np.arange(begin, min(begin + 2048, steps + 1))
        rows = statistics_of(numbers, len(tensors), rng, steps)
        noise = rng.standard_normal(len(numbers))
        connection.execute("BEGIN")
        for step, row, wobble in zip(numbers.tolist(), rows, noise.tolist(), strict=True):
            values = recorder._numbers(step, scalars_of(step, steps, wobble))
            for window in recorder._rollups.close_before(step):
                windows.insert(connection, window)
            when = STARTED + SECONDS * step
            connection.execute("INSERT INTO steps VALUES (?, ?, ?, ?)", (step, when, values, row))
            recorder._rollups.add(step, when, values, row)
            recorder._last = step
        connection.execute("COMMIT")
    _histograms(recorder, steps, len(tensors), rng)
    _happenings(recorder, steps, tensors, pins)
    if state in ("done", "stopped", "failed"):
        recorder.close(state)
    elif state == "crashed":
        recorder._put(process={"pid": 1 << 30, "started": 1, "machine": _machine(recorder)})
        recorder._file.close()
    else:
        connection.execute("PRAGMA synchronous = NORMAL")
        recorder._file.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        OPEN.append(recorder)
    return folder


OPEN: list[Recorder] = []
"""Recorders of runs that are live: they may be written to further, and closed."""


def _histograms(recorder: Recorder, steps: int, tensors: int, rng: np.random.Generator) -> None:
    """Those that a recorder would have kept of one every 16 steps."""
    count = steps // 16
    stride = histogram_codec.stride_of_older(count)
    exponents = np.arange(64) - 48
    connection = recorder._file.connection
    connection.execute("BEGIN")
    for ordinal in range(count):
        if ordinal % stride and ordinal < count - histogram_codec.NEWEST:
            continue
        step = (ordinal + 1) * 16
        center = np.array([-10.0, -6.0, -16.0])[None, :, None] - 2 * step / steps
        shape = np.exp(-0.5 * ((exponents - center) / 2.5) ** 2) * 65536 * (1 + rng.random((tensors, 1, 1)))
        counts = shape.astype(np.int64)
        counts[..., 0] = 12
        connection.execute(
            "INSERT INTO histograms VALUES (?, ?, ?)", (step, ordinal, histogram_codec.encode(counts))
        )
    connection.execute("COMMIT")


def _happenings(recorder: Recorder, steps: int, tensors: list[dict], pins: int) -> None:
    """Two alerts, validations, checkpoints, a sample, a batch, a skipped step, a note, and pinned weights."""
    connection = recorder._file.connection
    connection.execute("BEGIN")
    for step in range(250, steps + 1, 250):
        when = STARTED + SECONDS * step
        recorder_event(connection, step, when, "validation", '{"loss": 2.5, "best": true}')
        recorder_event(connection, step, when, "checkpoint", f'{{"path": "checkpoints/step-{step:08d}"}}')
    connection.execute("COMMIT")
    third, half = steps // 3, steps // 2
    for number, alert in enumerate(
        (
            {"cause": "non-finite", "severity": "fault", "step": third, "until": third},
            {"cause": "dead", "severity": "warning", "step": half + 1, "until": None},
        )
    ):
        tensor = tensors[-1 if number == 0 else min(4, len(tensors) - 1)]["name"]
        keys = {"key": f"alert.{alert['cause']}", "remedy": f"alert.{alert['cause']}.remedy"}
        recorder.alert({"id": number, **alert, "tensors": [tensor], "values": {"count": 7}, **keys})
    recorder.event(third, STARTED + SECONDS * third, "skipped", {"reason": "non-finite"})
    recorder.event(steps, STARTED + SECONDS * steps, "sample", {"text": "def f(x):\n    return <b>x</b>"})
    for pin in range(pins):
        tensor = min(1 + pin, len(tensors) - 1)
        theta = 0.4
        for begin in range(1, steps + 1, 1000):
            rows = []
            for step in range(begin, min(begin + 1000, steps + 1)):
                grad = math.sin(step / 50) / (1 + step / 100)
                rows.append(weight_row(tensor, (3, 5 + pin), theta, grad))
                theta = rows[-1]["after"]
            connection.execute("BEGIN")
            for step, row in enumerate(rows, begin):
                recorder._weight(step, row)
            connection.execute("COMMIT")


def recorder_event(connection, step: int, when: float, kind: str, data: str) -> None:
    connection.execute(
        "INSERT INTO events (step, time, kind, data) VALUES (?, ?, ?, ?)", (step, when, kind, data)
    )


def weight_row(tensor: int, index: tuple[int, ...], theta: float, grad: float) -> dict:
    return {
        "tensor": tensor,
        "index": list(index),
        "before": theta,
        "after": theta - 3e-4 * grad,
        "grad": grad,
        "clip": 1.0,
        "exp_avg_before": grad / 2,
        "exp_avg_after": grad / 2 + grad / 10,
        "exp_avg_sq_before": grad * grad / 3,
        "exp_avg_sq_after": grad * grad / 2,
        "lr": 3e-4,
        "weight_decay": 0.1,
    }


def _machine(recorder: Recorder) -> str:
    from clinometer.record.format.process import this_process

    return this_process()["machine"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pins", type=int, default=1)
    given = parser.parse_args()
    begin = time.perf_counter()
    synthetic(given.folder, given.steps, given.layers, pins=given.pins)
    print(f"{given.steps} steps of {2 + 7 * given.layers} tensors in {time.perf_counter() - begin:.1f} s")
