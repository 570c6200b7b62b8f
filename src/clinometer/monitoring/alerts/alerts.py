"""Alerts: one for each cause. An alert opens when the cause lasts, grows with each new tensor, and closes.

A rule looks at each step and returns the tensors that show its cause. An alert opens when a tensor has shown
it for `opens` steps in a row, and closes after `closes` steps without any: a healthy run must stay silent,
so one unusual step is not an alert unless `opens` is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from clinometer.messages import say, sentences
from clinometer.monitoring.alerts.facts import Facts, Trouble
from clinometer.monitoring.alerts.rules import RULES, Rule

SHOWN = 3


class _Case(NamedTuple):
    rule: Rule
    streaks: dict[int, int]
    """Steps in a row for each tensor; −1 stands for the loop as a whole."""


class Alerts:
    """All rules, and the alerts so far."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self._tell = tell
        self._cases = [_Case(make(), {}) for make in RULES]
        self._open: dict[str, dict[str, Any]] = {}
        self._calm: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._all: list[dict[str, Any]] = []
        self.seen = 0
        """Steps that were judged."""

    def all(self) -> list[dict[str, Any]]:
        return [dict(alert) for alert in self._all]

    def look(self, facts: Facts) -> None:
        """Judge one step."""
        self.seen += 1
        for rule, streaks in self._cases:
            trouble = rule.look(facts)
            now = () if trouble is None else trouble.tensors or (-1,)
            lasting = []
            for index in now:
                streaks[index] = streaks.get(index, 0) + 1
                if streaks[index] >= rule.opens:
                    lasting.append(index)
            for index in [index for index in streaks if index not in now]:
                del streaks[index]
            if lasting:
                assert trouble is not None
                self._show(rule, facts, trouble, [facts.names[i] for i in lasting if i >= 0])
            elif trouble is None and rule.cause in self._open:
                self._calm[rule.cause] += 1
                if self._calm[rule.cause] >= rule.closes:
                    self._close(self._open.pop(rule.cause))

    def raise_now(
        self,
        cause: str,
        severity: str,
        values: dict[str, Any],
        *,
        variant: str,
        step: int,
        lasts: bool = True,
    ) -> None:
        """An alert about the loop as a whole that no step shows; one that does not last, steps may close."""
        alert = {
            "id": len(self._all),
            "cause": cause,
            "severity": severity,
            "step": step,
            "until": None,
            "tensors": [],
            "values": values,
            "key": _key(cause, variant, "what"),
            "remedy": _key(cause, variant, "remedy"),
        }
        self._all.append(alert)
        if not lasts:
            self._open[cause], self._calm[cause], self._last[cause] = alert, 0, step
        self._tell(dict(alert))

    def _show(self, rule: Rule, facts: Facts, trouble: Trouble, names: list[str]) -> None:
        self._calm[rule.cause] = 0
        alert = self._open.get(rule.cause)
        if alert is None:
            alert = {
                "id": len(self._all),
                "cause": rule.cause,
                "severity": trouble.severity,
                "step": facts.step,
                "until": None,
                "tensors": names,
                "values": dict(trouble.values),
                "key": _key(rule.cause, trouble.variant, "what"),
                "remedy": _key(rule.cause, trouble.variant, "remedy"),
            }
            if facts.batch is not None:
                alert["values"]["batch"] = facts.batch
            self._all.append(alert)
            self._open[rule.cause] = alert
            self._last[rule.cause] = facts.step
            self._tell(dict(alert))
            return
        self._last[rule.cause] = facts.step
        known = set(alert["tensors"])
        joined = [name for name in names if name not in known]
        if joined:
            alert["tensors"] = [*alert["tensors"], *joined]
            self._tell(dict(alert))

    def _close(self, alert: dict[str, Any]) -> None:
        alert["until"] = self._last[alert["cause"]]
        self._tell(dict(alert))


def _key(cause: str, variant: str, part: str) -> str:
    own = f"alert.{cause}.{variant}.{part}"
    return own if variant and own in sentences("en") else f"alert.{cause}.{part}"


def render(alert: dict[str, Any], language: str | None = None) -> str:
    """What happened and what to do, for a person."""
    names = alert["tensors"]
    shown = say("gradients.list.separator", language).join(names[:SHOWN])
    shown += f" (+{len(names) - SHOWN})" if len(names) > SHOWN else ""
    values = {**alert["values"], "count": len(names), "names": shown, "step": alert["step"]}
    what, remedy = (say(alert[part], language, **values) for part in ("key", "remedy"))
    return say("messages.two_sentences", language, first=what, second=remedy)
