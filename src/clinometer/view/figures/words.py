"""Sentences about what a run file holds: alerts, statistics, kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clinometer.messages import say, sentences
from clinometer.view.figures.style import four
from clinometer.vocabulary import BY_NAME


def statistic_label(name: str, language: str) -> str:
    """What a statistic is called: "gradient norm ‖g‖"."""
    return (_known(BY_NAME[name].label_key, language) if name in BY_NAME else None) or name


def statistic_unit(name: str, language: str) -> str:
    return (_known(BY_NAME[name].unit_key, language) if name in BY_NAME else None) or ""


def statistic_choices(recorded: Sequence[str], language: str) -> list[dict[str, str]]:
    """Names and labels of the recorded statistics and of those derived from them, as a page offers them."""
    known = [
        {"name": one.name, "label": _known(one.choice_key, language) or one.name}
        for one in BY_NAME.values()
        if one.name in recorded
    ]
    return known + [{"name": name, "label": name} for name in recorded if name not in BY_NAME]


def statistic_axis(name: str, language: str) -> str:
    """Label and unit, as an axis shows them."""
    label, unit = statistic_label(name, language), statistic_unit(name, language)
    return f"{label} ({unit})" if unit else label


def is_log(name: str) -> bool:
    """Whether a statistic is shown by its order of magnitude."""
    return name in BY_NAME and BY_NAME[name].log


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
