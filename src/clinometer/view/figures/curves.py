"""Curves over the whole run beside the loss: learning rate, gradient norm, speed, noise scale."""

from __future__ import annotations

from typing import Any

import numpy as np

from clinometer.record.read.reader import RunFile
from clinometer.view.figures.scalars import alert_ticks, over_steps, positive, read_scalars, ticks_axis
from clinometer.view.figures.speed import rates
from clinometer.view.figures.style import Figure, Style, band, four, line, listed, percent, style, times


def lr(
    run: RunFile,
    *,
    language: str = "en",
    theme: str = "light",
    first: int | None = None,
    last: int | None = None,
    points: int = 1000,
) -> Figure:
    """The learning rate of each parameter group."""
    say = style(language, theme)
    names = sorted((n for n in run.scalar_names() if n == "lr" or n.startswith("lr.")), key=_group)[:8]
    found = read_scalars(run, names, first, last, points)
    if found is None:
        return say.empty("lr")
    data = []
    for name, colour in zip(names, say.series, strict=False):
        label = say.say("lr.group", group=_group(name)) if len(names) > 1 else say.say("lr.one")
        data.append(line(found["step"], found[name]["mean"], label, colour))
    values = found[names[0]]["mean"]
    peak = int(np.nanargmax(values)) if np.isfinite(values).any() else 0
    caption = say.join(
        say.say("lr.healthy"),
        say.say(
            "lr.this",
            now=four(float(values[-1])),
            peak=four(float(values[peak])),
            step=f"{int(found['step'][peak]):,}",
        ),
    )
    layout = say.layout(
        f"{run.id}-lr",
        xaxis=over_steps(run, say, first, last),
        yaxis=say.axis(say.say("axis.lr"), rangemode="tozero", exponentformat="e"),
        showlegend=len(names) > 1,
    )
    return Figure(data, layout, caption)


def norm(
    run: RunFile,
    *,
    language: str = "en",
    theme: str = "light",
    first: int | None = None,
    last: int | None = None,
    points: int = 1000,
) -> Figure:
    """The norm of all gradients together, the limit it is clipped to, and where it was clipped."""
    say = style(language, theme)
    found = read_scalars(run, ["total_norm", "max_norm", "clip", "before_clipping"], first, last, points)
    if found is None or "total_norm" not in found:
        return say.empty("norm")
    step, values = found["step"], found["total_norm"]
    data = []
    if found["stride"] > 1:
        data += band(step, positive(values["min"]), positive(values["max"]), say["accent"])
    data.append(line(step, positive(values["mean"]), say.say("norm.line"), say["accent"]))
    limit = found["max_norm"]["mean"] if "max_norm" in found else None
    if limit is not None and np.isfinite(limit).any():
        dashed = {"color": say["soft"], "width": 1, "dash": "dash"}
        data.append(line(step, limit, say.say("norm.limit"), say["soft"], line=dashed))
    clipped = np.zeros(len(step), dtype=bool)
    if "clip" in found:
        clipped = np.nan_to_num(found["clip"]["min"], nan=1.0) < 1.0
        at = values["max"] if found["stride"] > 1 else values["mean"]
        data.append(
            {
                **line(step[clipped], positive(at[clipped]), say.say("norm.clipped"), say["raise"]),
                "mode": "markers",
                "marker": {"color": say["raise"], "size": 4, "symbol": "circle-open"},
                "customdata": listed(found["clip"]["min"][clipped]),
                "hovertemplate": say.say("norm.clip_hover"),
            }
        )
    data += alert_ticks(run, say, first, last)
    layout = say.layout(
        f"{run.id}-norm",
        xaxis=over_steps(run, say, first, last),
        yaxis=say.log(say.say("axis.norm")),
        yaxis2=ticks_axis(),
    )
    return Figure(data, layout, _norm_caption(say, step, values, clipped, found))


def _norm_caption(
    say: Style, step: np.ndarray, values: dict[str, np.ndarray], clipped: np.ndarray, found: dict[str, Any]
) -> str:
    mean, peak = values["mean"], values["max"]
    good = np.isfinite(mean) & (mean > 0)
    parts: list[str | None] = [say.say("norm.healthy")]
    if good.any():
        median = float(np.median(mean[good]))
        top = int(np.where(good, peak, -np.inf).argmax())
        ratio = float(peak[top]) / median
        parts.append(
            say.say(
                "norm.this",
                median=four(median),
                peak=four(float(peak[top])),
                step=f"{int(step[top]):,}",
                times=times(ratio),
            )
        )
        n = max(1, len(mean) // 10)
        early, late = float(np.median(mean[good][:n])), float(np.median(mean[good][-n:]))
        if len(mean) >= 40 and late > 3 * early:
            parts.append(say.say("norm.grows", times=times(late / early)))
    if clipped.any():
        key = "norm.clip_share" if found["stride"] == 1 else "norm.clip_share_rolled"
        parts.append(say.say(key, share=percent(float(clipped.mean())), stride=f"{found['stride']:,}"))
    elif "clip" in found:
        parts.append(say.say("norm.never_clipped"))
    before = found.get("before_clipping")
    if before is not None and np.nanmax(before["mean"], initial=-1.0) == 0.0:
        parts.append(say.say("norm.after_clipping"))
    if not np.isfinite(mean).all() and np.isinf(mean).any():
        parts.append(say.say("norm.not_finite", step=f"{int(step[np.isinf(mean)][0]):,}"))
    return say.join(*parts)


def speed(
    run: RunFile,
    *,
    language: str = "en",
    theme: str = "light",
    first: int | None = None,
    last: int | None = None,
    points: int = 1000,
) -> Figure:
    """Tokens a second; steps a second where no tokens were counted."""
    say = style(language, theme)
    found = read_scalars(run, ["seconds", "tokens"], first, last, points)
    if found is None or "seconds" not in found:
        return say.empty("speed")
    step, seconds = found["step"], found["seconds"]["mean"]
    tokens = "tokens" in found and np.isfinite(found["tokens"]["mean"]).any()
    amount = found["tokens"]["mean"] if tokens else np.ones_like(seconds)
    values = rates(amount, seconds)
    unit = "speed.tokens" if tokens else "speed.steps"
    layout = say.layout(
        f"{run.id}-speed",
        xaxis=over_steps(run, say, first, last),
        yaxis=say.axis(say.say("axis.tokens" if tokens else "axis.steps_rate"), rangemode="tozero"),
        showlegend=False,
    )
    good = values[np.isfinite(values)]
    caption = say.say("speed.healthy")
    if len(good):
        slow = int(np.nanargmin(values))
        caption = say.join(
            caption,
            say.say(
                "speed.this",
                median=say.say(unit, value=four(float(np.median(good)))),
                slow=say.say(unit, value=four(float(values[slow]))),
                step=f"{int(step[slow]):,}",
            ),
        )
    return Figure([line(step, values, say.say(unit, value="").strip(), say["accent"])], layout, caption)


def noise(
    run: RunFile,
    *,
    language: str = "en",
    theme: str = "light",
    first: int | None = None,
    last: int | None = None,
    points: int = 1000,
) -> Figure:
    """The gradient's noise scale: the batch at which noise and signal are alike (McCandlish et al. 2018)."""
    say = style(language, theme)
    found = read_scalars(run, ["noise_scale", "tokens"], first, last, points)
    if found is None or "noise_scale" not in found or not np.isfinite(found["noise_scale"]["mean"]).any():
        return say.empty("noise")
    step, values = found["step"], found["noise_scale"]
    data = []
    if found["stride"] > 1:
        data += band(step, positive(values["min"]), positive(values["max"]), say["accent"])
    data.append(line(step, positive(values["mean"]), say.say("noise.line"), say["accent"]))
    now = values["mean"][np.isfinite(values["mean"])][-max(1, len(step) // 10) :]
    caption = say.join(say.say("noise.healthy"), say.say("noise.this", value=four(float(np.median(now)))))
    axis = say.log(say.say("axis.noise"))
    steps = over_steps(run, say, first, last)
    layout = say.layout(f"{run.id}-noise", xaxis=steps, yaxis=axis, showlegend=False)
    return Figure(data, layout, caption)


def _group(name: str) -> int:
    tail = name.partition(".")[2]
    return int(tail) if tail.isdigit() else 0
