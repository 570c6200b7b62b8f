"""What the loop does with the gradients: which tensors an optimizer has, which move, what accumulates."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator

import torch
from torch.optim import Optimizer

from clinometer.distributed.ranks import Ranks, whole
from clinometer.gradients.diagnose.loop_finding import loop_finding
from clinometer.gradients.diagnose.optimizer_membership import Membership, Optimizers
from clinometer.gradients.diagnose.trial_step import TrialStep
from clinometer.gradients.optimizers.identity import tensors_of
from clinometer.gradients.optimizers.shared_memory import pairs_that_overlap
from clinometer.gradients.report.finding import EXPLAINED, FAULT, Finding
from clinometer.gradients.report.formatting import format_number, shorten
from clinometer.gradients.sandbox.closure import Closure
from clinometer.gradients.sandbox.sandbox import Before
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.trace.observed_run import ObservedRun
from clinometer.torch_internals.modules import RunningNorm


def check_optimizers(membership: Membership) -> list[Finding]:
    """Returns the findings that need no run."""
    return [*membership.findings(), *_rates(membership.optimizers)]


def check_run(
    subject: Subject,
    run: ObservedRun,
    membership: Membership,
    before: Before,
    ranks: Ranks,
    *,
    closure: Closure,
    apart: Collection[str] = (),
) -> list[Finding]:
    """Returns the findings of one forward and backward, and of one step of each optimizer, which is undone.

    Tensors in `apart` are left out of the optimizers on purpose: that they are is not reported.
    """
    reached = run.flow.graph.leaves if run.flow else {}
    found = [
        *membership.findings(apart, reached, run.getting),
        *_rates(membership.optimizers),
        *_shared(subject, run, membership.optimizers),
        *_accumulated(subject, before),
        *_statistics(subject, before),
    ]
    if "clipped" in run.trace.amp:
        found.append(loop_finding("unscaled-amp", FAULT, (), where=run.trace.amp["clipped"]))
    if run.flow is not None:
        for optimizer in filter(_steps_alone, membership.optimizers):
            found += TrialStep(subject, run, optimizer, before, ranks, closure).findings()
    return found


def _rates(optimizers: Optimizers) -> list[Finding]:
    return [finding for optimizer in optimizers for finding in _learning_rates(optimizer)]


def _learning_rates(optimizer: Optimizer) -> Iterator[Finding]:
    groups = [i for i, group in enumerate(optimizer.param_groups) if float(group.get("lr", 1.0)) == 0.0]
    if groups:
        # A schedule may begin or end at 0; without a schedule it stays 0.
        scheduled = all("initial_lr" in optimizer.param_groups[i] for i in groups)
        severity = EXPLAINED if scheduled else FAULT
        yield loop_finding("zero-lr", severity, (), n=len(groups), groups=shorten([*map(str, groups)], 6))


def _shared(subject: Subject, run: ObservedRun, optimizers: Optimizers) -> Iterator[Finding]:
    """Parameters over one memory that are all stepped: each step moves the same numbers more than once."""
    held = tensors_of(*optimizers)
    stepped = {
        name: tensor
        for name, tensor in subject.tensors.items()
        if id(tensor) in held and tensor.requires_grad and run.sizes.get(name) is not None
    }
    for one, other in pairs_that_overlap(stepped):
        yield loop_finding("shared-memory", FAULT, (one, other), one=one, other=other)


def _accumulated(subject: Subject, before: Before) -> Iterator[Finding]:
    """Gradients from before that are a multiple of this one: backward ran again without zero_grad."""
    cross = own = old = 0.0
    names = []
    with torch.no_grad():
        for name, tensor in subject.tensors.items():
            kept, now = before.grad_of(tensor), tensor.grad if tensor.is_leaf else None
            if kept is None or now is None or kept.layout is not torch.strided or kept.shape != now.shape:
                continue
            if now.layout is not torch.strided or now.is_complex() or kept.dtype != now.dtype:
                continue
            names.append(name)
            kept, now = whole(kept), whole(now)
            cross += float((kept.flatten().double() * now.flatten().double()).sum())
            own += float(now.double().square().sum())
            old += float(kept.double().square().sum())
    if not own or not old or not cross / (own * old) ** 0.5 > 0.9999:
        return
    times = cross / own
    if 1.9 < times < 65 and abs(times - round(times)) < 0.01 * times:
        yield loop_finding("accumulating", FAULT, tuple(names), times=round(times))
    elif times > 100:
        yield loop_finding(
            "unscaled-amp", EXPLAINED, tuple(names), variant="held", times=format_number(times)
        )


def _statistics(subject: Subject, before: Before) -> Iterator[Finding]:
    """Running means and variances that this forward moved, of normalisations with nothing left to learn."""
    modules = () if subject.module is None else subject.module.named_modules()
    frozen = [
        (name, module)
        for name, module in modules
        if isinstance(module, RunningNorm)
        and module.affine
        and not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]
    moved = [
        f"{name}.{key}" if name else key
        for name, module in frozen
        for key, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point() and before.differs(buffer)
    ]
    if moved:
        yield loop_finding("moved-while-frozen", EXPLAINED, tuple(moved), variant="statistics")


def _steps_alone(optimizer: Optimizer) -> bool:
    """Whether its step needs no closure (LBFGS does)."""
    step = inspect.unwrap(type(optimizer).step)
    needed = [
        p
        for p in list(inspect.signature(step).parameters.values())[1:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return not needed and not getattr(optimizer, "defaults", {}).get("differentiable", False)
