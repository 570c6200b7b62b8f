"""A watch as a document, for a terminal or a notebook: how far it is, and its alerts."""

from __future__ import annotations

from typing import Any

from clinometer.gradients.report.document import Document, Line, fault, note, ok, sentence
from clinometer.messages import say
from clinometer.monitoring.alerts.alerts import render


def summary_of(tensors: int, step: int, alerts: list[dict[str, Any]], closed: bool) -> Document:
    """One line that says how far, then one paragraph for each alert; a closed alert is marked as a note."""
    lines: Document = [
        Line(sentence("watch.watched" if closed else "watch.watching", count=tensors, step=step))
    ]
    for alert in alerts:
        mark = note("· ") if alert["until"] is not None or alert["severity"] == "explained" else fault("✗ ")
        lines.append(Line((mark, render(alert)), hang=2))
    if not alerts:
        lines.append(Line((ok("✓ "), say("watch.no_alert")), hang=2))
    return lines
