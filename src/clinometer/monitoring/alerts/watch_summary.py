"""A watch as a document, for a terminal or a notebook: how far it is, and its alerts."""

from __future__ import annotations

from typing import Any

from clinometer.gradients.report.document import Document, Line, fault, note, ok, sentence
from clinometer.messages import say
from clinometer.monitoring.alerts.alerts import render
from clinometer.monitoring.alerts.rules import steps_needed


def summary_of(tensors: int, step: int, alerts: list[dict[str, Any]], closed: bool, seen: int) -> Document:
    """One line that says how far, then one paragraph for each alert; a closed alert is marked as a note.

    Before the rules have judged as many steps as they need (`seen`), no alert is no good sign yet.
    """
    lines: Document = [
        Line(sentence("watch.watched" if closed else "watch.watching", count=tensors, step=step))
    ]
    for alert in alerts:
        mark = note("· ") if alert["until"] is not None or alert["severity"] == "explained" else fault("✗ ")
        lines.append(Line((mark, render(alert)), hang=2))
    needed = steps_needed()
    if not alerts and not seen:
        lines.append(Line((note("· "), say("watch.no_step")), hang=2))
    elif not alerts and seen < needed:
        lines.append(Line((note("· "), say("watch.too_early", seen=seen, needed=needed)), hang=2))
    elif not alerts:
        lines.append(Line((ok("✓ "), say("watch.no_alert")), hang=2))
    return lines
