"""One tensor: its statistics over time, and its histograms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clinometer.record.read.reader import RunFile
from clinometer.view.figures import colours
from clinometer.view.figures.colours import see_through
from clinometer.view.figures.fineness import points_for
from clinometer.view.figures.scalars import alert_ticks, over_steps, positive, ticks_axis
from clinometer.view.figures.style import (
    Figure,
    Style,
    band,
    four,
    line,
    packed,
    percent,
    power_of_two,
    style,
    times,
)
from clinometer.view.figures.words import is_log, statistic_axis, statistic_label, statistic_unit
from clinometer.vocabulary import BY_NAME

BUCKETS = 64
FLOAT16_ZERO = -25
"""What is smaller than 2^-25, half of float16's smallest number, becomes zero."""
FLOAT16_NORMAL = -14
"""Below 2^-14 float16 loses precision bit by bit. bfloat16 does so at 2^-126, under every bucket."""


def tensor(
    run: RunFile,
    *,
    tensor: dict[str, Any],
    language: str = "en",
    theme: str = "light",
    stat: Sequence[str] = ("grad_norm",),
    first: int | None = None,
    last: int | None = None,
    points: int = 1000,
) -> Figure:
    """Statistics of one tensor over time: the mean, and the range where steps are rolled up."""
    say = style(language, theme)
    data: list[dict[str, Any]] = []
    parts: list[str | None] = []
    points = points_for(run, first, last, points)
    for name, colour in zip(stat, say.series, strict=False):
        found = run.series([tensor["id"]], name, first, last, points)
        if not len(found["step"]):
            continue
        mean, low, high = (np.asarray(found[k][0], dtype=np.float64) for k in ("mean", "min", "max"))
        if is_log(name):
            shown, low, high = positive(mean), positive(low), positive(high)
        else:
            shown = mean
        if found["stride"] > 1:
            data += band(found["step"], low, high, colour)
        data.append(line(found["step"], shown, statistic_label(name, language), colour))
        if is_log(name) and (mean == 0).any() and not (mean == 0).all():
            data.append(_zeros(say, found["step"][mean == 0], colour))
        parts.append(_series_caption(say, name, found["step"], mean))
    if not data:
        return say.empty("tensor", name=tensor["name"])
    log = all(is_log(name) for name in stat)
    title = statistic_axis(stat[0], language)
    if len(stat) > 1:
        units = {statistic_unit(name, language) for name in stat} - {""}
        title = say.say("axis.statistics", unit=", ".join(sorted(units)) or say.say("unitless"))
    data += alert_ticks(run, say, first, last)
    layout = say.layout(
        f"{run.id}-tensor-{tensor['id']}",
        xaxis=over_steps(run, say, first, last),
        yaxis=say.log(title) if log else say.axis(title),
        yaxis2=ticks_axis(),
        showlegend=len(stat) > 1,
    )
    return Figure(data, layout, say.join(say.say(f"tensor.healthy_{_family(stat[0])}"), *parts))


def ridge(
    run: RunFile,
    *,
    tensor: dict[str, Any],
    kind: str = "grad",
    language: str = "en",
    theme: str = "light",
    first: int | None = None,
    last: int | None = None,
    count: int = 64,
) -> Figure:
    """Histograms over steps: the share of the entries at each power of two."""
    say = style(language, theme)
    found = run.histograms(tensor["id"], kind, first, last, count)
    steps, counts = found["step"], np.asarray(found["counts"])
    if not len(steps):
        return say.empty("histogram", name=tensor["name"])
    low, high = _window(counts)
    exponents = np.arange(low, high + 1)
    total = np.maximum(counts.sum(1, keepdims=True), 1)
    share = (counts / total)[:, exponents - found["low_exponent"]].T
    shown = np.where(share > 0, share, np.nan).astype(np.float32)
    data = [
        {
            "type": "heatmap",
            "x": steps.tolist(),
            "y": exponents.tolist(),
            "z": packed(shown),
            "zmin": 0,
            "zmax": float(np.nanmax(shown)) if np.isfinite(shown).any() else 1.0,
            "colorscale": colours.scale(say.theme),
            "hoverongaps": False,
            "colorbar": {
                "title": {
                    "text": say.say("axis.share"),
                    "side": "right",
                    "font": {"size": 11, "color": say["soft"]},
                },
                "tickfont": {"size": 11, "color": say["soft"]},
                "tickformat": ".0%",
                "thickness": 10,
                "outlinewidth": 0,
            },
            "hovertemplate": say.say("ridge.hover"),
        }
    ]
    layout = say.layout(
        f"{run.id}-ridge-{tensor['id']}-{kind}",
        xaxis=over_steps(run, say, first, last),
        yaxis=_powers(say, kind, low, high),
        hovermode="closest",
        shapes=_underflow(say, low, high, horizontal=True),
        annotations=_underflow_names(say, low, high, horizontal=True),
    )
    return Figure(data, layout, _histogram_caption(say, kind, counts[-1], int(steps[-1])))


def histogram(
    run: RunFile,
    *,
    tensor: dict[str, Any],
    step: int,
    kind: str = "grad",
    language: str = "en",
    theme: str = "light",
) -> Figure:
    """The newest histogram at or before `step`."""
    say = style(language, theme)
    window = 64 * max(1, run.info()["every"])  # one is taken every 16 recorded steps
    found = run.histograms(tensor["id"], kind, max(0, step - window), step, 128)
    if not len(found["step"]):
        return say.empty("histogram", name=tensor["name"])
    counts, at = np.asarray(found["counts"])[-1], int(found["step"][-1])
    low, high = _window(counts[None])
    exponents = np.arange(low, high + 1)
    picked = counts[exponents - found["low_exponent"]]
    total = max(1, int(counts.sum()))
    data = [
        {
            "type": "bar",
            "x": exponents.tolist(),
            "y": (picked / total).tolist(),
            "customdata": picked.tolist(),
            "marker": {"color": say["accent"]},
            "hovertemplate": say.say("histogram.hover"),
        }
    ]
    layout = say.layout(
        f"{run.id}-histogram-{tensor['id']}-{kind}",
        xaxis=_powers(say, kind, low, high),
        yaxis=say.axis(say.say("axis.share"), tickformat=".0%"),
        bargap=0.08,
        hovermode="closest",
        shapes=_underflow(say, low, high, horizontal=False),
        annotations=_underflow_names(say, low, high, horizontal=False),
    )
    return Figure(data, layout, _histogram_caption(say, kind, counts, at))


def _series_caption(say: Style, name: str, step: np.ndarray, mean: np.ndarray) -> str:
    good = np.isfinite(mean)
    label = statistic_label(name, say.language)
    if np.isinf(mean).any():
        return say.say("tensor.not_finite", label=label, step=f"{int(step[np.isinf(mean)][0]):,}")
    if not good.any():
        return say.say("tensor.none", label=label)
    values = mean[good]
    if not values.any() and name != "grad_zeros":
        return say.say("tensor.all_zero", label=label)
    n = max(1, len(values) // 10)
    early, late = float(np.median(values[:n])), float(np.median(values[-n:]))
    text = say.say(
        "tensor.now", label=label, value=four(late), low=four(values.min()), high=four(values.max())
    )
    if is_log(name) and early > 0 and late > 0 and len(values) >= 20 and not 1 / 3 < late / early < 3:
        key = "tensor.rose" if late > early else "tensor.fell"
        text = say.join(text, say.say(key, times=times(max(late / early, early / late))))
    return text


def _family(name: str) -> str:
    return BY_NAME[name].axis if name in BY_NAME else name


def _zeros(say: Style, step: np.ndarray, colour: str) -> dict[str, Any]:
    """A log axis has no zero: true zeros are drawn at its lower end."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": step.tolist(),
        "y": [0.0] * len(step),
        "yaxis": "y2",
        "marker": {"color": colour, "size": 5, "symbol": "triangle-down"},
        "name": say.say("tensor.zero"),
        "hovertemplate": say.say("tensor.zero") + "<extra></extra>",
        "showlegend": False,
    }


def _window(counts: np.ndarray) -> tuple[int, int]:
    """The exponents worth showing: where anything is, and float16's underflow when it is near."""
    used = np.flatnonzero(counts[:, 1:].any(0)) + 1
    if not len(used):
        return -30, 0
    return max(-47, int(used[0]) - 50), min(15, int(used[-1]) - 46)


def _powers(say: Style, kind: str, low: int, high: int) -> dict[str, Any]:
    ticks = [e for e in range(-48, 20) if low <= e <= high and e % (4 if high - low > 14 else 2) == 0]
    return say.axis(
        say.say(f"axis.power_{kind}"),
        tickvals=ticks,
        ticktext=[f"2<sup>{e}</sup>" for e in ticks],
        range=[low - 0.5, high + 0.5],
        zeroline=False,
    )


def _marks(low: int, high: int) -> list[tuple[str, int]]:
    marks = [("float16", FLOAT16_ZERO), ("float16_normal", FLOAT16_NORMAL)]
    # bfloat16 reaches down to 2^-133, below every bucket: its mark is drawn where the buckets end.
    return [(name, exponent) for name, exponent in marks if low <= exponent <= high]


def _underflow(say: Style, low: int, high: int, *, horizontal: bool) -> list[dict[str, Any]]:
    shapes = []
    for name, exponent in _marks(low, high):
        line = {"color": say["warning"], "width": 1, "dash": "dot" if "normal" in name else "solid"}
        at = exponent - 0.5
        place = (
            {"xref": "paper", "x0": 0, "x1": 1, "y0": at, "y1": at}
            if horizontal
            else {"yref": "paper", "y0": 0, "y1": 1, "x0": at, "x1": at}
        )
        shapes.append({"type": "line", "line": line, **place})
    return shapes


def _underflow_names(say: Style, low: int, high: int, *, horizontal: bool) -> list[dict[str, Any]]:
    notes = []
    for name, exponent in _marks(low, high):
        place = (
            {"xref": "paper", "x": 1, "xanchor": "right", "y": exponent - 0.5, "yanchor": "top"}
            if horizontal
            else {"yref": "paper", "y": 1, "yanchor": "top", "x": exponent - 0.5, "xanchor": "right"}
        )
        font = {"size": 10, "color": say["warning"]}
        label = {"text": say.say(f"underflow.{name}"), "showarrow": False, "font": font}
        notes.append({**label, "bgcolor": see_through(say["paper"], 0.85), **place})
    foot = {"xref": "paper", "yref": "paper", "x": 0, "y": 0, "xanchor": "left", "yanchor": "bottom"}
    text = ("↓ " if horizontal else "← ") + say.say("underflow.bfloat16")
    return [*notes, {"text": text, "showarrow": False, "font": {"size": 10, "color": say["soft"]}, **foot}]


def _histogram_caption(say: Style, kind: str, counts: np.ndarray, step: int) -> str:
    total = max(1, int(counts.sum()))
    zero = int(counts[0]) / total
    exponents = np.arange(BUCKETS) - 48
    nonzero = counts.copy()
    nonzero[0] = 0
    parts: list[str | None] = [say.say(f"ridge.healthy_{kind}")]
    if nonzero.sum():
        middle = int(np.searchsorted(np.cumsum(nonzero), nonzero.sum() / 2))
        parts.append(say.say("ridge.middle", step=f"{step:,}", power=power_of_two(int(exponents[middle]))))
    if zero > 0:
        parts.append(say.say("ridge.zeros", share=percent(zero)))
    if kind == "grad":
        lost = int(nonzero[exponents < FLOAT16_ZERO].sum()) / total
        if lost > 0:
            parts.append(say.say("ridge.float16", share=percent(lost)))
    if counts[63]:
        parts.append(say.say("ridge.top", count=f"{int(counts[63]):,}"))
    return say.join(*parts)
