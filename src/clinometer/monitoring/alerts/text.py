"""A watch in a notebook's cell: how far it is, and the alerts."""

from __future__ import annotations

from typing import Any

from clinometer.gradients.report.document import Document, Line, fault, note, ok, sentence
from clinometer.messages import say
from clinometer.monitoring.alerts.alerts import render


def document(tensors: int, step: int, alerts: list[dict[str, Any]], closed: bool) -> Document:
    """One line that says how far, then an alert a paragraph; those that are over are marked as notes."""
    lines: Document = [
        Line(sentence("watch.watched" if closed else "watch.watching", count=tensors, step=step))
    ]
    for alert in alerts:
        mark = note("· ") if alert["until"] is not None or alert["severity"] == "explained" else fault("✗ ")
        lines.append(Line((mark, render(alert)), hang=2))
    if not alerts:
        lines.append(Line((ok("✓ "), say("watch.no_alert")), hang=2))
    return lines
