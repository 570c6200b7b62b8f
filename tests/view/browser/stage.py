"""Runs for the page to show: one really trained, that can be replayed, and others only recorded."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import numpy as np

from clinometer.record.write.recorder import Recorder
from clinometer.vocabulary import STATISTICS

HOSTILE = '<img src=x onerror="window.hacked=1">.weight'
"""A tensor's name that is markup; on the page it is text."""
HOSTILE_RUN = '<b onclick="window.hacked=1">bold</b> & "quoted"'
STEPS = 20


def trained(folder: Path) -> Path:
    """Train about 20,000 weights for twenty steps, and record the run with numbers made up around its own."""
    from clinometer.training.run.loop import train
    from clinometer.training.run.prepare import start
    from clinometer.training.settings.config import (
        DataConfig,
        ModelConfig,
        OptimConfig,
        RunConfig,
        TrainingConfig,
    )

    corpus = folder.parent / "corpus.txt"
    corpus.parent.mkdir(parents=True, exist_ok=True)
    line = "the quick brown fox jumps over <b>the lazy</b> dog\n\tif gradient > 0: step(down)\n"
    line += "梯度指向上升的方向\n"
    corpus.write_text("".join(line + str(i * i) for i in range(300)), encoding="utf-8")
    config = RunConfig(
        model=ModelConfig(context_length=48, d_model=32, num_layers=2, num_heads=2, d_ff=48),
        data=DataConfig(corpus=str(corpus), vocab_size=300),
        optim=OptimConfig(lr=1e-2),
        training=TrainingConfig(
            steps=STEPS, batch_size=12, eval_every=5, eval_batches=2, sample_every=10, sample_tokens=8,
            checkpoint_every=7, precision="float32", compile="off", device="cpu",
        ),
    )  # fmt: skip
    display = _Silent()
    train(start(config, folder, display), display)
    return folder


class _Silent:
    def notice(self, key, /, **values): ...
    def begin(self, *args, **values): ...
    def progress(self, key, done, total): ...
    def step(self, row): ...
    def validation(self, step, loss, best): ...
    def sample(self, step, text): ...


def shapes_of(folder: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a trained run's weights, in the forward's order."""
    from clinometer.training.run.load_run import load_run

    return [(name, tuple(p.shape)) for name, p in load_run(folder).model.named_parameters()]


SMALL = [
    ("embed.weight", (64, 16)),
    ("blocks.0.attn.qkv.weight", (48, 16)),
    ("blocks.0.norm.weight", (16,)),
    ("blocks.0.scale", ()),
    ("blocks.1.attn.qkv.weight", (48, 16)),
    ("blocks.1.conv.weight", (8, 4, 3, 3)),
    (HOSTILE, (16, 16)),
    ("head.weight", (64, 16)),
]


class Written:
    """A recorder with made-up numbers: `step()` writes one step more."""

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "written",
        shapes: list[tuple[str, tuple[int, ...]]] | None = None,
        seed: int = 0,
        pins: tuple[tuple[int, tuple[int, ...]], ...] = (),
        config: dict | None = None,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.shapes = SMALL if shapes is None else shapes
        self.pins = pins
        self.theta = [0.4 + i / 10 for i in range(len(pins))]
        self.at = 0
        self.started = time.time() - 600
        self.recorder = Recorder(folder)
        self.recorder.begin(
            {
                "name": name,
                "started": self.started,
                "config": config or {"optim": {"lr": 1e-3}, "note": "<i>not markup</i>"},
                "environment": {"python": "3.12.0"},
                "statistics": list(STATISTICS),
                "every": 1,
                "model": "Net",
                "optimizers": ["AdamW"],
            }
        )
        self.recorder.tensors([self._tensor(k, *one) for k, one in enumerate(self.shapes)])

    def _tensor(self, number: int, name: str, shape: tuple[int, ...]) -> dict:
        parts = name.split(".")
        layer = next((int(part) for part in parts if part.isdigit()), None)
        kind = ".".join(parts[2:-1]) or parts[0]
        return {
            "id": number, "name": name, "shape": list(shape), "dtype": "float32", "numel": math.prod(shape),
            "group": 0, "layer": layer, "kind": kind, "position": number,
        }  # fmt: skip

    def step(self, *, broken: bool = False) -> None:
        self.at += 1
        step, n = self.at, len(self.shapes)
        when = self.started + 0.5 * step
        noise = self.rng.standard_normal(n)
        norm = (0.5 + np.arange(n) / n) / math.sqrt(1 + step / 20) * np.exp(0.2 * noise)
        rows = np.zeros((n, len(STATISTICS)), dtype=np.float32)
        rows[:, 0], rows[:, 1] = norm, norm / 8
        rows[:, 4], rows[:, 5], rows[:, 6], rows[:, 7] = 12, 0.01, 0.3, norm / 2
        rows[2, :2], rows[2, 2] = 0, 1
        if broken:
            rows[-1, 0], rows[-1, 3] = np.inf, 3
        loss = 2 + 4 * math.exp(-step / 40) + 0.05 * float(noise[0])
        scalars = {
            "loss": loss, "lr": 1e-3 * min(1, step / 20), "total_norm": float(np.linalg.norm(norm)),
            "clip": 1.0, "max_norm": 1.0, "before_clipping": 1.0, "tokens": 576.0, "seconds": 0.5,
            "taken": 1.0,
        }  # fmt: skip
        self.recorder.step(step, when, scalars, rows)
        if self.pins:
            self.recorder.weights(step, [self._pin(k, step) for k in range(len(self.pins))])
        if step % 16 == 0:
            exponents = np.arange(64) - 48
            counts = 4096 * np.exp(-0.5 * ((exponents + 8 + self.rng.random((n, 3, 1))) / 2.5) ** 2)
            self.recorder.histograms(step, counts.astype(np.int64))
        if step % 50 == 0:
            self.recorder.event(step, when, "validation", {"loss": loss + 0.1, "best": True})

    def _pin(self, k: int, step: int) -> dict:
        tensor, index = self.pins[k]
        grad = math.sin(step / 9)
        before, self.theta[k] = self.theta[k], self.theta[k] - 1e-3 * grad
        return {
            "tensor": tensor, "index": list(index), "before": before, "after": self.theta[k], "grad": grad,
            "clip": 1.0, "exp_avg_before": grad / 2, "exp_avg_after": grad / 1.9, "exp_avg_sq_before": 0.3,
            "exp_avg_sq_after": 0.31, "lr": 1e-3, "weight_decay": 0.1,
        }  # fmt: skip

    def alerts(self) -> None:
        names = [name for name, _ in self.shapes]
        for number, (cause, severity, first, until, which) in enumerate(
            [("non-finite", "fault", 60, 60, names[-1:]), ("dead", "warning", 30, None, names[2:3]),
             ("exploding", "warning", 90, 95, names[:6])]
        ):  # fmt: skip
            self.recorder.alert(
                {"id": number, "cause": cause, "severity": severity, "step": first, "until": until,
                 "tensors": which, "values": {"count": 3}, "key": f"alert.{cause}",
                 "remedy": f"alert.{cause}.remedy"}
            )  # fmt: skip

    def reports(self) -> None:
        when = self.started + 30
        name = self.shapes[0][0]
        for kind in ("diagnosis", "check"):
            text = f"✗ {name} has no gradient: the path is cut\n    model.py:41   h = h.detach() "
            text += "<script>window.hacked=1</script>"
            self.recorder.event(
                self.at, when, "report",
                {"kind": kind, "title": f"{kind} <u>of the model</u>",
                 "document": {"healthy": False, "findings": [{"cause": "cut", "names": [name]}]},
                 "text": {"en": text, "zh": f"✗ {name} 没有梯度：路径被切断了"}},
            )  # fmt: skip

    def close(self, state: str = "done") -> None:
        self.recorder.close(state)

    def die(self) -> None:
        """As after kill -9: nothing is said, and the process is gone."""
        self.recorder._put(process={"pid": 1 << 30, "started": 1, "machine": _machine()})
        self.recorder._file.close()


def _machine() -> str:
    from clinometer.record.format.process import this_process

    return this_process()["machine"]


def written(folder: Path, steps: int = 120, *, state: str = "done", **given) -> Path:
    run = Written(folder, **given)
    for step in range(1, steps + 1):
        run.step(broken=step == 60)
    run.alerts()
    run.reports()
    if state == "crashed":
        run.die()
    elif state != "live":
        run.close(state)
    return folder


def replayable(folder: Path) -> Path:
    """`trained`, recorded, with step 9 replayed and one weight of it explained."""
    from clinometer.training.replay.replay import replay_step
    from clinometer.training.replay.replayed_weight import explain_weight

    trained(folder)
    shapes = shapes_of(folder)
    run = Written(folder, name="trained", shapes=shapes, pins=((2, (3, 5)),))
    for _ in range(STEPS):
        run.step()
    run.close()
    path = replay_step(folder, 9, lambda *_: None)
    explain_weight(path, shapes[2][0], (3, 5))
    return folder


if __name__ == "__main__":
    import sys

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    root = Path(sys.argv[1])
    replayable(root / "trained")
    written(root / "small", name=HOSTILE_RUN)
    written(root / "crashed", state="crashed", name="crashed")
