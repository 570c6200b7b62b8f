"""Sentences about what a run file holds: alerts, statistics, kinds."""

from __future__ import annotations

from typing import Any

from clinometer.messages import say, sentences
from clinometer.view.figures.style import four

_BY_MAGNITUDE = ("_norm", "_max", "_rms", "_ratio")


def statistic_label(name: str, language: str) -> str:
    """What a statistic is called: "gradient norm ‖g‖"."""
    return _known(f"figure.statistic.{name}", language) or name


def statistic_unit(name: str, language: str) -> str:
    return _known(f"figure.unit.{name}", language) or ""


def statistic_axis(name: str, language: str) -> str:
    """Label and unit, as an axis shows them."""
    label, unit = statistic_label(name, language), statistic_unit(name, language)
    return f"{label} ({unit})" if unit else label


def is_log(name: str) -> bool:
    """Whether a statistic is shown by its order of magnitude."""
    return name.endswith(_BY_MAGNITUDE)


def alert_sentences(alert: dict[str, Any], language: str) -> tuple[str, str]:
    """An alert's sentence and its remedy; a cause without a sentence in this version is shown by its name."""
    names = alert["tensors"]
    own = {"names": _names(names, language), "count": f"{len(names):,}", "step": f"{alert['step']:,}"}
    values = {
        name: four(value) if isinstance(value, float) else value
        for name, value in alert.get("values", {}).items()
    }
    text = _filled(alert.get("key"), language, {**values, **own}) or str(alert["cause"])
    return text, _filled(alert.get("remedy"), language, {**values, **own}) or ""


def _names(names: list[str], language: str, keep: int = 3) -> str:
    listed = say("figure.list.separator", language).join(names[:keep])
    rest = len(names) - keep
    return listed if rest <= 0 else say("figure.list.more", language, names=listed, count=f"{rest:,}")


def _filled(key: Any, language: str, values: dict[str, Any]) -> str | None:
    if not isinstance(key, str) or not key.startswith("alert."):
        return None
    template = _known(key, language)
    try:
        return None if template is None else say(key, language, **values)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        return None  # recorded by another version, whose sentence took other values


def _known(key: str, language: str) -> str | None:
    return sentences(language).get(key)
