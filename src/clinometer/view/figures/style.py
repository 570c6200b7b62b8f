"""What all figures share: their form, their axes, and how a number is written."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clinometer.messages import say
from clinometer.view.figures import colours
from clinometer.view.figures.colours import Theme

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Noto Sans CJK SC', sans-serif"
MINUS = "−"
LARGEST = float(np.finfo(np.float32).max)
"""What a run file keeps of a norm that float32 cannot hold."""


@dataclass
class Figure:
    """A Plotly figure as plain dicts with its caption, or what to do where there is nothing."""

    data: list[dict[str, Any]] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)
    caption: str = ""
    empty: str | None = None

    def to_plotly(self) -> dict[str, Any]:
        """What `plotly.graph_objects.Figure(...)` and `Plotly.react` take."""
        return {"data": self.data, "layout": self.layout}

    def to_dict(self) -> dict[str, Any]:
        figure = None if self.empty else self.to_plotly()
        return {"figure": figure, "caption": self.caption, "empty": self.empty}


@dataclass(frozen=True)
class Style:
    """Language and theme of one figure, and the words and axes in them."""

    language: str
    theme: Theme

    def say(self, key: str, /, **values: Any) -> str:
        return say(f"figure.{key}", self.language, **values)

    def __getitem__(self, token: str) -> str:
        return colours.tokens(self.theme)[token]

    @property
    def series(self) -> list[str]:
        return colours.series(self.theme)

    def join(self, *parts: str | None) -> str:
        """Sentences one after the other, with the space between them that the language has."""
        space = say("messages.two_sentences", self.language, first="", second="")
        return space.join(part for part in parts if part)

    def names(self, names: list[str], keep: int = 3) -> str:
        """The first names and how many more there are."""
        listed = self.say("list.separator").join(names[:keep])
        rest = len(names) - keep
        return listed if rest <= 0 else self.say("list.more", names=listed, count=f"{rest:,}")

    def empty(self, key: str, /, **values: Any) -> Figure:
        return Figure(empty=self.say(f"empty.{key}", **values))

    def axis(self, title: str, **more: Any) -> dict[str, Any]:
        """An axis with its title, which names the unit."""
        return {
            "title": {"text": title, "font": {"size": 12, "color": self["soft"]}, "standoff": 6},
            "gridcolor": self["rule"],
            "linecolor": self["faint"],
            "zerolinecolor": self["faint"],
            "tickfont": {"size": 11, "color": self["soft"]},
            "automargin": True,
            **more,
        }

    def steps(self, **more: Any) -> dict[str, Any]:
        """The axis of steps, the same in every figure over time, so that a zoom can be shared."""
        return self.axis(
            self.say("axis.step"), type="linear", tickformat=",", showgrid=False, zeroline=False, **more
        )

    def log(self, title: str, **more: Any) -> dict[str, Any]:
        return self.axis(title, type="log", exponentformat="power", showexponent="all", **more)

    def colour_key(self, title: str) -> dict[str, Any]:
        """A colour bar with the meaning of its colours."""
        font = {"size": 11, "color": self["soft"]}
        return {
            "title": {"text": title, "side": "right", "font": font},
            "tickfont": font,
            "thickness": 10,
            "outlinewidth": 0,
        }

    def layout(self, revision: str, **more: Any) -> dict[str, Any]:
        """A layout without title, on the page's own paper; `revision` keeps the zoom through updates."""
        return {
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": FONT, "size": 12, "color": self["ink"]},
            "margin": {"l": 56, "r": 16, "t": 8, "b": 40},
            "hovermode": "x unified",
            "hoverlabel": {
                "bgcolor": self["panel"],
                "bordercolor": self["rule"],
                "font": {"family": FONT, "size": 12, "color": self["ink"]},
            },
            "legend": {
                "orientation": "h",
                "x": 0,
                "y": 1.02,
                "yanchor": "bottom",
                "traceorder": "normal",
                "font": {"size": 11, "color": self["soft"]},
                "bgcolor": "rgba(0,0,0,0)",
            },
            "colorway": self.series,
            "uirevision": revision,
            "separators": ".,",
            **more,
        }


def style(language: str, theme: str) -> Style:
    return Style(language, "dark" if theme == "dark" else "light")


def four(x: float | None, *, sign: bool = False) -> str:
    """Four significant digits, scientific outside 1e-3…1e4, "0" for a true zero, "–" for nothing.

    A run file keeps float32's largest number of a norm that float32 cannot hold: "≥ 3.403e+38".
    """
    if x is None or math.isnan(x):
        return "–"
    if math.isinf(x):
        return "∞" if x > 0 else f"{MINUS}∞"
    if x == 0:
        return "0"
    size = abs(x)
    text = f"{size:#.4g}".rstrip(".") if 1e-3 <= size < 9_999.5 else f"{size:.3e}"
    if x == LARGEST:
        return f"≥ {text}"
    return (MINUS if x < 0 else "+" if sign else "") + text


def times(ratio: float) -> str:
    """A factor in words: two digits, whole from 10 on."""
    if not math.isfinite(ratio):
        return "∞"
    return f"{ratio:.2g}" if ratio < 10 else f"{ratio:,.0f}" if ratio < 1e5 else f"{ratio:.0e}"


def power_of_two(exponent: int) -> str:
    """2⁻¹²."""
    return "2" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def percent(share: float) -> str:
    """A share in per cent, two digits."""
    size = abs(share) * 100
    text = "0" if size == 0 else f"{size:.2g}" if size < 10 else f"{size:.0f}"
    return (MINUS if share < 0 else "") + text


def listed(values: np.ndarray) -> list[float | None]:
    """Numbers for JSON, None (a gap in a line) where one is not finite."""
    return [x if math.isfinite(x) else None for x in np.asarray(values, dtype=np.float64).tolist()]


def packed(values: np.ndarray) -> dict[str, str]:
    """A big array as Plotly's base64 form; NaN inside stays a gap."""
    values = np.ascontiguousarray(values)
    codes = {"float32": "f4", "float64": "f8", "int32": "i4", "uint8": "u1"}
    spec = {
        "dtype": codes[values.dtype.name],
        "bdata": base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode(),
    }
    if values.ndim > 1:
        spec["shape"] = ", ".join(map(str, values.shape))
    return spec


def band(
    step: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str, **more: Any
) -> list[dict[str, Any]]:
    """Two traces: the range of a rolled-up line, filled."""
    shared = {
        "type": "scatter",
        "mode": "lines",
        "x": step.tolist(),
        "line": {"width": 0, "color": colour},
        "hoverinfo": "skip",
        "showlegend": False,
        **more,
    }
    return [
        {**shared, "y": listed(low), "meta": "low"},
        {
            **shared,
            "y": listed(high),
            "fill": "tonexty",
            "fillcolor": colours.see_through(colour, 0.18),
            "meta": "high",
        },
    ]


def line(step: np.ndarray, values: np.ndarray, name: str, colour: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": step.tolist(),
        "y": listed(values),
        "name": name,
        "line": {"color": colour, "width": 1.5},
        "hovertemplate": "%{y:.4g}",
        **more,
    }
