"""What figures over time share: reading scalars, ticks for alerts, text that is safe in a label."""

from __future__ import annotations

from typing import Any

import numpy as np

from clinometer.record.read.reader import RunFile
from clinometer.view.figures.style import Style
from clinometer.view.figures.words import alert_sentences

MAX_TICKS = 200


def read_scalars(
    run: RunFile, names: list[str], first: int | None, last: int | None, points: int
) -> dict[str, Any] | None:
    """The scalars of `names` that there are; None where nothing was recorded in this range."""
    known = set(run.scalar_names())
    wanted = [name for name in names if name in known]
    if not wanted:
        return None
    found = run.scalars(wanted, first, last, points)
    return found if len(found["step"]) else None


def alert_ticks(run: RunFile, say: Style, first: int | None, last: int | None) -> list[dict[str, Any]]:
    """Alerts as ticks on the axis of steps; the text is in the hover."""
    alerts = [a for a in run.alerts(first, last, MAX_TICKS) if a["severity"] != "explained"]
    if not alerts:
        return []
    low, high = first if first is not None else 0, last if last is not None else 2**53
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": say.say("alerts"),
            "x": [min(max(a["step"], low), high) for a in alerts],
            "y": [0.02] * len(alerts),
            "yaxis": "y2",
            "marker": {
                "symbol": "line-ns-open",
                "size": 10,
                "line": {"width": 2},
                "color": [say["alarm"] if a["severity"] == "fault" else say["warning"] for a in alerts],
            },
            "text": [escaped(alert_sentences(a, say.language)[0]) for a in alerts],
            "customdata": [a["id"] for a in alerts],
            "hovertemplate": "%{text}<extra></extra>",
            "meta": "alerts",
            "showlegend": False,
        }
    ]


def over_steps(run: RunFile, say: Style, first: int | None, last: int | None, **more: Any) -> dict[str, Any]:
    """The axis of steps over the requested range: the same for every figure of that range."""
    info = run.info()
    low = info["first_step"] if first is None else first
    high = info["last_step"] if last is None else last
    if low is None or high is None:
        return say.steps(**more)
    return say.steps(range=[low - 0.5, max(high, low) + 0.5], **more)


def ticks_axis() -> dict[str, Any]:
    return {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}


def escaped(text: str, limit: int = 200) -> str:
    """Text from a run as Plotly shows it: its labels read a few HTML tags, and a name must not be one."""
    return shortened(text, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def positive(values: np.ndarray) -> np.ndarray:
    """What a log axis can show."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)
