"""The four numbers on top of a run, and its line in the list of runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from clinometer.messages import say
from clinometer.record.read.reader import RunFile
from clinometer.view.figures.speed import newest, rates, recent, summary
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
    loss, since = newest(run, "loss")
    return {
        "loss": loss,
        "not_finite_since": since,
        "speed": speed,
        "steps_per_second": steps_per_second,
        "spark": spark,
    }


def strip(run: RunFile, language: str) -> list[dict[str, Any]]:
    """Loss, total gradient norm, speed, alerts: value, text and the last 100 steps.

    A value that is not finite is marked, with the first step where that happened.
    """
    found = recent(run, ["loss", "total_norm", "tokens", "seconds"])
    speed, steps_per_second = summary(found)
    seconds = found.get("seconds")
    with_tokens = speed is not None
    amount = found.get("tokens") if with_tokens else None if seconds is None else np.ones_like(seconds)
    speeds = None if amount is None or seconds is None else rates(amount, seconds)
    info = run.info()

    def number(
        name: str, value: float | None, values: np.ndarray | None, unit: str, since: int | None = None
    ) -> dict[str, Any]:
        text = four(value) if name != "alerts" else f"{value:,}"
        told = unit and say(f"figure.strip.{unit}", language)
        if since is not None:
            text = say("figure.strip.not_finite", language)
            told = say("figure.strip.since", language, step=f"{since:,}")
        return {
            "name": name,
            "label": say(f"figure.strip.{name}", language),
            "unit": told,
            "value": value,
            "not_finite_since": since,
            "text": text,
            "spark": [] if values is None else listed(values),
            "step": [] if values is None else found["step"].tolist(),
        }

    loss, norm = newest(run, "loss"), newest(run, "total_norm")
    return [
        number("loss", loss[0], found.get("loss"), "", loss[1]),
        number("norm", norm[0], found.get("total_norm"), "", norm[1]),
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
