"""A finding about the loop: which tensors an optimizer holds, what a step does, what accumulates."""

from __future__ import annotations

from typing import Any

from clinometer.gradients.report.finding import Finding, Severity
from clinometer.gradients.report.places import Where


def loop_finding(
    cause: str,
    severity: Severity,
    names: tuple[str, ...],
    *,
    variant: str = "",
    where: Where | None = None,
    linked: tuple[str, ...] = (),
    owned: tuple[str, ...] = (),
    **values: Any,
) -> Finding:
    key = f"diagnosis.loop.{cause}"
    return Finding(cause, "loop", severity, key, names, where, values, variant, linked, owned)
