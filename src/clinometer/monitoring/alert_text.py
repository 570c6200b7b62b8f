"""An alert as a person reads it."""

from __future__ import annotations

from typing import Any

from clinometer.messages import say

_NAMED = 3


def alert_text(alert: dict[str, Any], language: str | None = None) -> str:
    """What happened, at which step and to which tensors, then the remedy."""
    names = ", ".join(alert["tensors"][:_NAMED])
    if len(alert["tensors"]) > _NAMED:
        names = say("watch.and_more", language, names=names, more=len(alert["tensors"]) - _NAMED)
    values = {"step": alert["step"], "tensors": names, "count": len(alert["tensors"]), **alert["values"]}
    said = [say(alert[part], language, **values) for part in ("key", "remedy") if alert.get(part)]
    return " ".join(said)
