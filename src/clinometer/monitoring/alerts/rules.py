"""All alert rules, in the order in which each step is judged."""

from __future__ import annotations

from typing import Protocol

from clinometer.monitoring.alerts.facts import Facts, Trouble
from clinometer.monitoring.alerts.rules_accumulation import Accumulating, Discarded, NoStep
from clinometer.monitoring.alerts.rules_clipping import AlwaysClipped, UnscaledAmp
from clinometer.monitoring.alerts.rules_gradient_size import Exploding, Vanishing
from clinometer.monitoring.alerts.rules_loss import LossSpike
from clinometer.monitoring.alerts.rules_no_gradient import Dead, NoGradient, NothingLearns
from clinometer.monitoring.alerts.rules_not_finite import NonFinite, StepNotFinite
from clinometer.monitoring.alerts.rules_rates import UpdateRatio, ZeroRate
from clinometer.monitoring.alerts.rules_updates import (
    Decay,
    MovedWhileFrozen,
    NeverMoves,
    NotInOptimizer,
    SharedMemory,
    StaleInOptimizer,
    WrittenBetween,
)


class Rule(Protocol):
    """One cause. A rule may keep what it needs of the past: `look` is called once a step, in order.

    Its thresholds are class attributes in capitals; docs/*/causes.md lists them with `opens` and `closes`.
    They are chosen so that a healthy run stays silent (tests/monitoring/healthy.py).
    """

    cause: str
    opens: int
    """Steps in a row that show the cause before the alert opens."""
    closes: int
    """Steps in a row without the cause before the alert closes."""

    def look(self, facts: Facts) -> Trouble | None: ...


RULES: tuple[type[Rule], ...] = (
    NonFinite,
    StepNotFinite,
    NothingLearns,
    Dead,
    NoGradient,
    NeverMoves,
    MovedWhileFrozen,
    NotInOptimizer,
    StaleInOptimizer,
    SharedMemory,
    Decay,
    WrittenBetween,
    Vanishing,
    UpdateRatio,
    Exploding,
    AlwaysClipped,
    LossSpike,
    ZeroRate,
    Accumulating,
    Discarded,
    NoStep,
    UnscaledAmp,
)


def thresholds_of(rule: type[Rule]) -> dict[str, float]:
    """The waiting times and thresholds of a rule, by name."""
    named = {name: value for name, value in vars(rule).items() if name.isupper() and not name.startswith("_")}
    return {"opens": rule.opens, "closes": rule.closes, **named}


def steps_needed() -> int:
    """The steps after which every rule could have opened an alert, but those that compare a longer run."""
    return max(rule.opens for rule in RULES)
