"""The loss: training, smoothed, and validation."""

from __future__ import annotations

import numpy as np

from clinometer.record.read.reader import RunFile
from clinometer.view.figures.scalars import alert_ticks, over_steps, read_scalars, ticks_axis
from clinometer.view.figures.style import Figure, Style, band, four, line, percent, style

TAIL = 0.1
"""The share of a curve, at its end, that a caption calls "lately"."""


def loss(
    run: RunFile,
    *,
    language: str = "en",
    theme: str = "light",
    first: int | None = None,
    last: int | None = None,
    points: int = 1000,
    smooth: float | None = None,
) -> Figure:
    """Training loss, faint and smoothed, and validation; `smooth` is the weight of what came before."""
    say = style(language, theme)
    found = read_scalars(run, ["loss"], first, last, points)
    if found is None:
        return say.empty("loss")
    step, values = found["step"], found["loss"]
    smoothed = smooth_out(values["mean"], default_smoothing(len(step)) if smooth is None else smooth)
    data = []
    if found["stride"] > 1:
        data += band(step, values["min"], values["max"], say["accent"])
    data.append(
        line(
            step,
            values["mean"],
            say.say("loss.train"),
            say["accent"],
            line={"color": say["accent"], "width": 1},
            opacity=0.35,
        )
    )
    data.append(
        line(
            step, smoothed, say.say("loss.smoothed"), say["accent"], line={"color": say["accent"], "width": 2}
        )
    )
    valid_step, valid = validation(run, first, last)
    if len(valid):
        data.append(
            line(
                valid_step,
                valid,
                say.say("loss.validation"),
                say["validation"],
                mode="lines+markers",
                cliponaxis=False,
                marker={"color": say["validation"], "size": 6},
            )
        )
    data += alert_ticks(run, say, first, last)
    axis = say.axis(say.say("axis.loss_nats" if _in_nats(run) else "axis.loss"))
    layout = say.layout(
        f"{run.id}-loss", xaxis=over_steps(run, say, first, last), yaxis=axis, yaxis2=ticks_axis()
    )
    return Figure(data, layout, _loss_caption(say, step, values["mean"], valid_step, valid))


def _loss_caption(
    say: Style, step: np.ndarray, loss: np.ndarray, valid_step: np.ndarray, valid: np.ndarray
) -> str:
    finite = np.isfinite(loss)
    healthy = say.say("loss.healthy")
    if not finite.any():
        return say.join(healthy, say.say("loss.nothing_finite"))
    bad = int(step[~finite][0]) if not finite.all() else None
    values, steps = loss[finite], step[finite]
    n = max(1, int(len(values) * TAIL))
    end = float(values[-n:].mean())
    parts = [
        healthy,
        say.say(
            "loss.went",
            start=four(float(values[0])),
            end=four(float(values[-1])),
            first=f"{steps[0]:,}",
            last=f"{steps[-1]:,}",
        ),
    ]
    if len(values) >= 40:
        before = float(values[-2 * n : -n].mean())
        spread = float(values[-2 * n :].std()) / np.sqrt(n)
        change = (end - before) / abs(before) if before else 0.0
        # Less than twice its own scatter is no trend.
        trend = "level" if abs(end - before) <= 2 * spread else "falling" if end < before else "rising"
        parts.append(say.say(f"loss.{trend}", change=percent(abs(change))))
    if len(valid):
        near = float(values[np.abs(steps - valid_step[-1]).argmin()])
        parts.append(say.say("loss.valid", value=four(float(valid[-1])), step=f"{int(valid_step[-1]):,}"))
        best = int(np.nanargmin(valid))
        if len(valid) - best > 3 and valid[-1] > valid[best] * 1.02 and near < valid[-1]:
            parts.append(
                say.say("loss.overfit", step=f"{int(valid_step[best]):,}", best=four(float(valid[best])))
            )
    if bad is not None:
        parts.append(say.say("loss.not_finite", step=f"{bad:,}"))
    return say.join(*parts)


def smooth_out(values: np.ndarray, weight: float) -> np.ndarray:
    """Exponential means from both ends, averaged, so that the curve does not lag; gaps stay."""
    if weight <= 0.0:
        return values
    return (_ema(values, weight) + _ema(values[::-1], weight)[::-1]) / 2


def _ema(values: np.ndarray, weight: float) -> np.ndarray:
    """mᵢ = w mᵢ₋₁ + (1−w) xᵢ, over 1−wⁱ so that the beginning is not pulled to zero."""
    smoothed = np.full(len(values), np.nan)
    m = total = 0.0
    for i, x in enumerate(values.tolist()):
        if x - x == 0.0:  # finite
            m, total = weight * m + (1 - weight) * x, weight * total + (1 - weight)
            smoothed[i] = m / total
    return smoothed


def default_smoothing(count: int) -> float:
    """A memory of a hundredth of what is shown: the shape of the curve, without its jitter."""
    return 1.0 - 1.0 / max(1.0, count / 100)


def validation(run: RunFile, first: int | None, last: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses of the validations."""
    found = run.events("validation", first, last, 1000, newest=True)
    pairs = sorted(
        (e["step"], e["data"]["loss"]) for e in found if isinstance(e["data"].get("loss"), int | float)
    )
    if not pairs and "validation_loss" in run.scalar_names():
        scalars = run.scalars(["validation_loss"], first, last, 1000)
        values = scalars["validation_loss"]["mean"]
        pairs = list(zip(scalars["step"][np.isfinite(values)], values[np.isfinite(values)], strict=True))
    steps = np.array([p[0] for p in pairs], dtype=np.int64)
    return steps, np.array([p[1] for p in pairs], dtype=np.float64)


def _in_nats(run: RunFile) -> bool:
    """Whether this is our own trainer's cross-entropy; of another script's loss the unit is not known."""
    config = run.info()["config"]
    return isinstance(config, dict) and {"model", "schedule", "data", "training"} <= set(config)
