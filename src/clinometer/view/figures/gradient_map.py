"""The gradient map: tensors in the order data flows, steps to the right, one statistic as colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clinometer.record.read.reader import RunFile
from clinometer.view.figures import colours
from clinometer.view.figures.fineness import points_for
from clinometer.view.figures.order import in_order, short_name
from clinometer.view.figures.scalars import escaped, over_steps
from clinometer.view.figures.style import Figure, Style, four, packed, style, times
from clinometer.view.figures.words import is_log, statistic_axis, statistic_label, statistic_unit
from clinometer.vocabulary import REGISTRY

RECENT = 0.1
"""The share of columns, at the end, by which rows are compared."""
FAR = 30.0
"""A row this many times away from the median of its like is named in the caption."""
MAX_HATCHED = 400
"""Stretches of zeros that are drawn, the longest first."""
GRADIENT = frozenset(one.name for one in REGISTRY if one.axis == "grad")
"""Statistics of a gradient's size: 0 is a gradient that is zero throughout."""


@dataclass
class Map:
    """Cells of tensors × columns in display order."""

    statistic: str
    tensors: list[dict[str, Any]]
    step: np.ndarray
    stride: int
    values: np.ndarray
    """float32; NaN: nothing there; +inf: not finite; 0: a true zero."""
    alarm: np.ndarray
    """bool: a gradient in this cell was not finite."""

    @property
    def log(self) -> bool:
        return is_log(self.statistic)

    @property
    def zero(self) -> npt.NDArray[np.bool_]:
        """bool: cells whose gradient was there and exactly zero throughout."""
        if self.statistic == "grad_zeros":
            return np.asarray(self.values == 1.0)
        if self.statistic not in GRADIENT:
            return np.zeros(self.values.shape, dtype=bool)
        return np.asarray(self.values == 0.0)

    @property
    def dead(self) -> npt.NDArray[np.bool_]:
        """bool, a row each: lately there were gradients, and every one was zero."""
        tail = slice(-max(1, int(len(self.step) * RECENT)), None)
        seen = np.isfinite(self.values[:, tail]) | self.alarm[:, tail]
        return np.asarray(seen.any(1) & (self.zero[:, tail] | ~seen).all(1))

    def dead_from(self, row: int) -> int:
        """The first column of the zeros that a dead row ends with."""
        alive = np.flatnonzero((np.isfinite(self.values[row]) & ~self.zero[row]) | self.alarm[row])
        return int(alive[-1]) + 1 if len(alive) else 0

    def bounds(self) -> tuple[float, float]:
        """The colour range, in log10 where the statistic is one of magnitude; free of a few outliers."""
        good = self.values[np.isfinite(self.values)]
        if self.log:
            good = np.log10(good[good > 0])
        if not len(good):
            return (-1.0, 1.0)
        low, high = (float(x) for x in np.percentile(good, [1, 99]))
        return (low, high) if high - low > 1e-6 else (low - 0.5, high + 0.5)


def read_map(
    run: RunFile,
    statistic: str = "grad_norm",
    first: int | None = None,
    last: int | None = None,
    *,
    columns: int = 1280,
    ids: Sequence[int] | None = None,
) -> Map:
    """The cells of one statistic, of all tensors or of `ids`."""
    tensors = in_order(run.tensors())
    if ids is not None:
        wanted = set(ids)
        tensors = [t for t in tensors if t["id"] in wanted]
    rows = [t["id"] for t in tensors]
    grid = run.grid(statistic, first, last, columns, rows)
    values = np.ascontiguousarray(grid["values"], dtype=np.float32)
    if statistic == "grad_norm":
        alarm = np.isposinf(values)
    else:
        alarm = _alarm(run, grid["step"], (first, last), columns, rows)
    return Map(statistic, tensors, grid["step"], int(grid["stride"]), values, alarm)


def _alarm(
    run: RunFile, step: np.ndarray, span: tuple[int | None, int | None], columns: int, rows: Sequence[int]
) -> np.ndarray:
    """Where gradients were not finite: looked for coarsely, then finely in the tensors that had any."""
    alarm = np.zeros((len(rows), len(step)), dtype=bool)
    coarse = run.grid("grad_nonfinite", *span, points_for(run, *span, columns), rows)["values"]
    found = np.flatnonzero((np.nan_to_num(coarse, nan=0.0) > 0).any(1))
    if len(found):
        fine = run.grid("grad_nonfinite", *span, columns, [rows[i] for i in found.tolist()])
        # A live run may have grown since: its newest column is then in one of the two only.
        both = min(len(step), fine["values"].shape[1])
        alarm[found, :both] = np.nan_to_num(fine["values"][:, :both], nan=0.0) > 0
    return alarm


def gradient_map(
    run: RunFile,
    *,
    language: str = "en",
    theme: str = "light",
    stat: str = "grad_norm",
    first: int | None = None,
    last: int | None = None,
    columns: int = 1280,
    tensors: Sequence[int] | None = None,
) -> Figure:
    """The map as a Plotly heat map (the page draws the same cells itself)."""
    say = style(language, theme)
    cells = read_map(run, stat, first, last, columns=columns, ids=tensors)
    if not len(cells.step) or not cells.tensors:
        return say.empty("map")
    names = [escaped(t["name"]) for t in cells.tensors]
    with np.errstate(divide="ignore"):
        shown = np.log10(cells.values) if cells.log else cells.values.copy()
    shown[~np.isfinite(shown) | cells.alarm] = np.nan
    low, high = cells.bounds()
    x = cells.step.tolist()
    at = f"%{{y}}<br>{say.say('axis.step')} %{{x}}"
    value = say.say("map.log" if cells.log else "map.value", label=statistic_label(stat, language))
    decades = np.arange(np.ceil(low), np.floor(high) + 1) if cells.log else np.array([])
    data: list[dict[str, Any]] = [
        {
            "type": "heatmap",
            "x": x,
            "y": names,
            "z": packed(shown.astype(np.float32)),
            "zmin": low,
            "zmax": high,
            "colorscale": colours.scale(say.theme),
            "hoverongaps": False,
            "hovertemplate": f"{at}<br>{value} %{{z:.4g}}<extra></extra>",
            "colorbar": {
                **say.colour_key(statistic_axis(stat, language)),
                **(
                    {"tickvals": decades.tolist(), "ticktext": [f"10<sup>{int(d)}</sup>" for d in decades]}
                    if len(decades) >= 2
                    else {}
                ),
            },
        }
    ]
    if cells.alarm.any():
        flat = np.where(cells.alarm, 1.0, np.nan).astype(np.float32)
        data.append(
            {
                "type": "heatmap",
                "x": x,
                "y": names,
                "z": packed(flat),
                "colorscale": [[0, say["alarm"]], [1, say["alarm"]]],
                "showscale": False,
                "hoverongaps": False,
                "name": say.say("map.not_finite"),
                "hovertemplate": f"{at}<br>{say.say('map.not_finite')}<extra></extra>",
            }
        )
    if cells.zero.any():
        data.append(_hatched(say, cells))
    layout = say.layout(
        f"{run.id}-map",
        xaxis=over_steps(run, say, first, last),
        yaxis=say.axis(
            say.say("axis.tensors"),
            type="category",
            autorange="reversed",
            tickvals=names,
            ticktext=[escaped(short_name(t), 40) for t in cells.tensors],
            showgrid=False,
            zeroline=False,
        ),
        hovermode="closest",
        barmode="overlay",
        showlegend=False,
        shapes=_rules(say, cells.tensors),
        height=max(240, 90 + 14 * len(names)),
    )
    return Figure(data, layout, map_caption(say, cells))


def map_caption(say: Style, cells: Map) -> str:
    """What a healthy map looks like and what this one does."""
    if not cells.log:
        return say.join(say.say("map.healthy_value"), _alarm_sentence(say, cells))
    parts = [say.say("map.healthy" if cells.statistic in GRADIENT else "map.healthy_other")]
    tail = max(1, int(len(cells.step) * RECENT))
    recent = np.where((cells.values > 0) & np.isfinite(cells.values), cells.values, np.nan)[:, -tail:]
    seen = [bool(np.isfinite(row).any()) for row in recent]
    if any(seen):
        level = np.exp(np.nanmean(np.log(recent[seen].astype(np.float64)), axis=1))
        names = [t["name"] for t, s in zip(cells.tensors, seen, strict=True) if s]
        kinds = [t.get("kind") or "" for t, s in zip(cells.tensors, seen, strict=True) if s]
        parts.append(say.say("map.spread", decades=four(float(np.log10(level.max() / level.min())))))
        ratio, worst, place = _odd_one(level, kinds)
        if ratio >= FAR:
            low = level[worst] < place
            parts.append(say.say("map.below" if low else "map.above", name=names[worst], times=times(ratio)))
    dead = [t["name"] for t, d in zip(cells.tensors, cells.dead, strict=True) if d]
    if dead:
        parts.append(say.say("map.dead", names=say.names(dead)))
    return say.join(*parts, _alarm_sentence(say, cells))


def _odd_one(level: np.ndarray, kinds: list[str]) -> tuple[float, int, float]:
    """How far the oddest row is from the median of its kind (of all, where a kind has fewer than three)."""
    everyone = float(np.median(level))
    place = np.full(len(level), everyone)
    for kind in set(kinds):
        same = np.array([k == kind for k in kinds])
        if kind and same.sum() >= 3:
            place[same] = np.median(level[same])
    distance = np.abs(np.log(level / place))
    worst = int(distance.argmax())
    return float(np.exp(distance[worst])), worst, float(place[worst])


def _alarm_sentence(say: Style, cells: Map) -> str | None:
    if not cells.alarm.any():
        return None
    column = int(cells.alarm.any(0).argmax())
    names = [t["name"] for t, a in zip(cells.tensors, cells.alarm[:, column].tolist(), strict=True) if a]
    return say.say("map.alarm", step=f"{int(cells.step[column]):,}", names=say.names(names))


def _hatched(say: Style, cells: Map) -> dict[str, Any]:
    """Stretches of zeros as bars with a hatch: a heat map's cells cannot have one."""
    edges = np.diff(np.pad(cells.zero, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (rows, starts), (_, ends) = np.nonzero(edges == 1), np.nonzero(edges == -1)
    longest = np.argsort(starts - ends, kind="stable")[:MAX_HATCHED]
    rows, starts, ends = rows[longest], starts[longest], ends[longest]
    return {
        "type": "bar",
        "orientation": "h",
        "y": [escaped(cells.tensors[row]["name"]) for row in rows],
        "x": ((ends - starts) * cells.stride).tolist(),
        "base": (cells.step[starts] - cells.stride / 2).tolist(),
        "width": 1,
        "marker": {
            "color": say["panel"],
            "pattern": {"shape": "/", "fgcolor": say["soft"], "size": 6, "solidity": 0.2},
            "line": {"width": 0},
        },
        "hovertemplate": f"%{{y}}<br>{say.say('map.zero')}<extra></extra>",
    }


def _rules(say: Style, tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A thin rule wherever one layer ends."""
    ends = [i for i in range(1, len(tensors)) if tensors[i]["layer"] != tensors[i - 1]["layer"]]
    line = {"color": say["paper"], "width": 1}
    return [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": i - 0.5, "y1": i - 0.5, "line": line}
        for i in ends
    ]


def map_answer(cells: Map, say: Style) -> dict[str, Any]:
    """The cells for the page's canvas."""
    low, high = cells.bounds()
    dead = np.flatnonzero(cells.dead).tolist()
    return {
        "stat": cells.statistic,
        "label": statistic_label(cells.statistic, say.language),
        "unit": statistic_unit(cells.statistic, say.language),
        "log": cells.log,
        "step": cells.step.tolist(),
        "stride": cells.stride,
        "first": int(cells.step[0]) if len(cells.step) else None,
        "last": int(cells.step[-1]) + cells.stride - 1 if len(cells.step) else None,
        "ids": [t["id"] for t in cells.tensors],
        "rows": len(cells.tensors),
        "columns": len(cells.step),
        "values": packed(cells.values)["bdata"],
        "alarm": packed(cells.alarm.astype(np.uint8))["bdata"],
        "low": low,
        "high": high,
        "dead": [cells.tensors[row]["id"] for row in dead],
        "dead_from": [cells.dead_from(row) for row in dead],
        "caption": map_caption(say, cells) if len(cells.step) and cells.tensors else "",
    }
