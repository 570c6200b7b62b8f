"""Several runs in one figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clinometer.record.read.reader import RunFile
from clinometer.view.figures.loss import default_smoothing, smooth_out
from clinometer.view.figures.scalars import escaped, positive, read_scalars, shortened
from clinometer.view.figures.speed import rates
from clinometer.view.figures.style import Figure, four, line, style

METRICS = ("loss", "norm", "speed", "lr")
_DASHES = ("solid", "dash", "dot")


def compare(
    runs: Sequence[RunFile],
    *,
    metric: str = "loss",
    language: str = "en",
    theme: str = "light",
    first: int | None = None,
    last: int | None = None,
    points: int = 500,
) -> Figure:
    """One curve a run: the smoothed loss, the gradient norm, the speed, or the learning rate."""
    say = style(language, theme)
    names = {"loss": ["loss"], "norm": ["total_norm"], "speed": ["tokens", "seconds"], "lr": ["lr"]}[metric]
    labels = _labels(runs)
    data, ends = [], []
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        found = read_scalars(run, names, first, last, points)
        if found is None or not set(names) <= set(found):
            continue
        if metric == "speed":
            values = rates(found["tokens"]["mean"], found["seconds"]["mean"])
        else:
            values = found[names[0]]["mean"]
        if metric == "loss":
            values = smooth_out(values, default_smoothing(len(values)))
        if metric == "norm":
            values = positive(values)
        finite = values[np.isfinite(values)]
        if len(finite):
            ends.append((float(finite[-1]), label))
        stroke = {
            "color": say.series[i % len(say.series)],
            "width": 1.5,
            "dash": _DASHES[i // len(say.series) % len(_DASHES)],
        }
        data.append(line(found["step"], values, escaped(label), "", line=stroke, meta=run.id))
    if not data:
        return say.empty("compare")
    title = say.say(
        {"loss": "axis.loss", "norm": "axis.norm", "speed": "axis.tokens", "lr": "axis.lr"}[metric]
    )
    layout = say.layout(
        f"compare-{metric}",
        xaxis=say.steps(),
        yaxis=say.log(title) if metric == "norm" else say.axis(title),
        showlegend=True,
    )
    caption = say.say(f"compare.healthy_{metric}")
    if ends and len(data) > 1:
        low, high = min(ends), max(ends)
        best, other = (high, low) if metric == "speed" else (low, high)
        caption = say.join(
            caption,
            say.say(
                "compare.this", best=best[1], value=four(best[0]), other=other[1], other_value=four(other[0])
            ),
        )
    return Figure(data, layout, caption)


def _labels(runs: Sequence[RunFile]) -> list[str]:
    """Names as they are, with the id where two are alike: a caption is plain text, a trace's name is not."""
    names = [str(run.info()["name"]) for run in runs]
    return [
        shortened(name) if names.count(name) == 1 else f"{shortened(name)} ({run.id[:6]})"
        for name, run in zip(names, runs, strict=True)
    ]
