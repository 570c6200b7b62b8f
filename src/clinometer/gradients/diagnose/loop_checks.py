"""What the loop does with the gradients: which tensors an optimizer has, which move, what accumulates."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from clinometer.distributed.ranks import Ranks, whole
from clinometer.gradients.diagnose.loop_finding import loop_finding
from clinometer.gradients.diagnose.optimizer_membership import Membership, Optimizers, tensors_of
from clinometer.gradients.report.finding import EXPLAINED, FAULT, Finding
from clinometer.gradients.report.formatting import format_number, shorten
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
    apart: Collection[str] = (),
) -> list[Finding]:
    """Returns the findings of one forward and backward, and of one step of each optimizer, which is undone.

    Tensors in `apart` are left out of the optimizers on purpose: that they are is not reported.
    """
    reached = run.flow.graph.leaves if run.flow else {}
    found = [
        *membership.findings(apart, reached, run.getting),
        *_rates(membership.optimizers),
        *_accumulated(subject, before),
        *_statistics(subject, before),
    ]
    if "clipped" in run.trace.amp:
        found.append(loop_finding("unscaled-amp", FAULT, (), where=run.trace.amp["clipped"]))
    if run.flow is not None:
        for optimizer in filter(_steps_alone, membership.optimizers):
            found += _one_step(subject, run, optimizer, before, ranks)
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


def _one_step(
    subject: Subject, run: ObservedRun, optimizer: Optimizer, before: Before, ranks: Ranks
) -> Iterator[Finding]:
    """Take one step with these gradients and see who moved; `untouched` takes it back."""
    held = tensors_of(optimizer)
    for parameter in held.values():
        if not parameter.requires_grad and before.grad_of(parameter) is not None and parameter.is_leaf:
            parameter.grad = before.grad_of(parameter)  # the loop's step would meet it
    # Without the hooks of the optimizer: what they report to must not see a step that is none.
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(optimizer)
    rates = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    ours = {name: t for name, t in subject.tensors.items() if id(t) in held}
    moved = ranks.named_by_any({name for name, t in ours.items() if before.differs(t)})
    frozen = tuple(name for name, t in ours.items() if not t.requires_grad and name in moved)
    if frozen:
        yield loop_finding("moved-while-frozen", FAULT, frozen)
    zero = tuple(n for n, t in ours.items() if t.requires_grad and n in moved and run.sizes[n] == 0)
    if zero:
        yield loop_finding("moved-while-frozen", EXPLAINED, zero, variant="zero_gradient")
    should = [n for n, t in ours.items() if t.requires_grad and run.sizes[n] and rates[id(t)].get("lr", 1.0)]
    # A step of NaN says nothing about rounding: an optimizer may refuse it, and a weight be NaN already.
    should = [n for n in should if math.isfinite(run.sizes[n] or 0.0) and not _is_rounding(ours[n], run)]
    still = tuple(name for name in should if name not in moved)
    if still:
        scheduled = all("initial_lr" in rates[id(ours[name])] for name in still)
        severity = FAULT if len(still) == len(should) and not scheduled else EXPLAINED
        yield loop_finding(
            "never-moves", severity, still, dtype=str(ours[still[0]].dtype).removeprefix("torch.")
        )


def _is_rounding(tensor: Tensor, run: ObservedRun) -> bool:
    """Whether its gradient cancels by construction, so that it need not move."""
    return run.flow is not None and run.flow.graph.leaves.get(id(tensor)) in run.flow.cancelled


def _steps_alone(optimizer: Optimizer) -> bool:
    """Whether its step needs no closure (LBFGS does)."""
    step = inspect.unwrap(type(optimizer).step)
    needed = [
        p
        for p in list(inspect.signature(step).parameters.values())[1:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return not needed and not getattr(optimizer, "defaults", {}).get("differentiable", False)
