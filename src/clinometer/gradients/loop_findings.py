"""What the optimizer will and will not do with these gradients."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from clinometer.gradients.finding import EXPLAINED, FAULT, Finding, Severity
from clinometer.gradients.running import Run
from clinometer.gradients.subject import Subject
from clinometer.gradients.untouched import Before


def standing(subject: Subject, optimizer: Optimizer | None) -> list[Finding]:
    """What can be said without running anything."""
    if optimizer is None:
        return []
    return [*_membership(subject, optimizer), *_learning_rates(optimizer)]


def of_run(subject: Subject, run: Run, optimizer: Optimizer | None, before: Before) -> list[Finding]:
    """What one forward and backward, and one step that is taken back, show."""
    return standing(subject, optimizer)


def _membership(subject: Subject, optimizer: Optimizer) -> list[Finding]:
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    ours = {id(t): name for name, t in subject.tensors.items()}
    missing = tuple(
        n for n, t in subject.tensors.items() if t.requires_grad and t.is_leaf and id(t) not in held
    )
    if subject.module is not None:
        ours.update({id(p): "" for p in subject.module.parameters()})
    strangers = [p for key, p in held.items() if key not in ours]
    shapes = [tuple(p.shape) for p in strangers]
    replaced = tuple(n for n in missing if tuple(subject.tensors[n].shape) in shapes)
    found = []
    if replaced:
        found.append(_loop("stale-in-optimizer", FAULT, replaced, stale=len(strangers)))
    if rest := tuple(n for n in missing if n not in replaced):
        found.append(_loop("not-in-optimizer", FAULT, rest))
    return found


def _learning_rates(optimizer: Optimizer) -> list[Finding]:
    groups = [i for i, g in enumerate(optimizer.param_groups) if float(g.get("lr", 1.0)) == 0.0]
    if not groups:
        return []
    scheduled = any("initial_lr" in optimizer.param_groups[i] for i in groups)
    listed = ", ".join(map(str, groups))
    return [_loop("zero-lr", EXPLAINED if scheduled else FAULT, (), groups=listed)]


def _loop(cause: str, severity: Severity, names: tuple[str, ...], **values: Any) -> Finding:
    return Finding(cause, "loop", severity, f"diagnosis.loop.{cause}", names, None, values)
