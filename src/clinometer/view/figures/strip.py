"""The four numbers on top of a run, and its line in the list of runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from clinometer.messages import say
from clinometer.record.reader import RunFile
from clinometer.view.figures.speed import last_finite, rates, recent, summary
from clinometer.view.figures.style import four, listed

SPARK_POINTS = 100


def last_values(run: RunFile) -> dict[str, Any]:
    """What the list of runs shows of one: loss, speed, and the whole loss curve in at most 100 points."""
    found = recent(run, ["loss", "tokens", "seconds"])
    speed, steps_per_second = summary(found)
    spark: list[float | None] = []
    if "loss" in found:
        spark = listed(run.scalars(["loss"], points=SPARK_POINTS)["loss"]["mean"])
        spark = spark[:: max(1, -(-len(spark) // SPARK_POINTS))]
    return {
        "loss": last_finite(found.get("loss")),
        "speed": speed,
        "steps_per_second": steps_per_second,
        "spark": spark,
    }


def strip(run: RunFile, language: str) -> list[dict[str, Any]]:
    """Loss, total gradient norm, speed, alerts: value, text and the last 100 steps."""
    found = recent(run, ["loss", "total_norm", "tokens", "seconds"])
    speed, steps_per_second = summary(found)
    seconds = found.get("seconds")
    with_tokens = speed is not None
    amount = found.get("tokens") if with_tokens else None if seconds is None else np.ones_like(seconds)
    speeds = None if amount is None or seconds is None else rates(amount, seconds)
    info = run.info()

    def number(name: str, value: float | None, values: np.ndarray | None, unit: str) -> dict[str, Any]:
        return {
            "name": name,
            "label": say(f"figure.strip.{name}", language),
            "unit": unit and say(f"figure.strip.{unit}", language),
            "value": value,
            "text": four(value) if name != "alerts" else f"{value:,}",
            "spark": [] if values is None else listed(values),
            "step": [] if values is None else found["step"].tolist(),
        }

    return [
        number("loss", last_finite(found.get("loss")), found.get("loss"), ""),
        number("norm", last_finite(found.get("total_norm")), found.get("total_norm"), ""),
        number(
            "speed",
            speed if with_tokens else steps_per_second,
            speeds,
            "tokens_unit" if with_tokens else "steps_unit",
        ),
        number("alerts", info["alert_count"], _open_alerts(run, found["step"]), ""),
    ]


def _open_alerts(run: RunFile, step: np.ndarray) -> np.ndarray | None:
    """How many alerts are open at each of these steps."""
    if not len(step):
        return None
    count = np.zeros(len(step))
    for alert in run.alerts(int(step[0]), int(step[-1])):
        until = alert["until"] if alert["until"] is not None else int(step[-1])
        count += (step >= alert["step"]) & (step <= until)
    return count
