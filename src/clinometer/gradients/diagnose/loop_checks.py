"""What the loop does with the gradients: which tensors an optimizer has, which move, what accumulates."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clinometer.distributed.ranks import Ranks, whole
from clinometer.gradients.diagnose.trial_step import TrialStep
from clinometer.gradients.optimizers.identity import tensors_of as _tensors_of
from clinometer.gradients.optimizers.shared_memory import pairs_that_overlap
from clinometer.gradients.report.finding import EXPLAINED, FAULT, Finding, Severity
from clinometer.gradients.report.formatting import format_number, shorten
from clinometer.gradients.report.module_names import owners
from clinometer.gradients.report.places import Where
from clinometer.gradients.sandbox.closure import Closure
from clinometer.gradients.sandbox.sandbox import Before
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.trace.observed_run import ObservedRun
from clinometer.torch_internals.modules import RunningNorm

Optimizers = tuple[Optimizer, ...]


def check_optimizers(
    subject: Subject, optimizers: Optimizers, apart: Collection[str] = (), reached: Collection[int] = ()
) -> list[Finding]:
    """Returns the findings that need no run; tensors whose ids are in `reached` are not stale."""
    if not optimizers:
        return []
    rates = [finding for optimizer in optimizers for finding in _learning_rates(optimizer)]
    return [*_membership(subject, optimizers, apart, reached), *rates]


def check_run(
    subject: Subject,
    run: ObservedRun,
    optimizers: Optimizers,
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
        *check_optimizers(subject, optimizers, apart, reached),
        *_hidden(subject, run, optimizers),
        *_shared(subject, run, optimizers),
        *_accumulated(subject, before),
        *_statistics(subject, before),
    ]
    if "clipped" in run.trace.amp:
        found.append(_loop("unscaled-amp", FAULT, (), where=run.trace.amp["clipped"]))
    if run.flow is not None:
        for optimizer in filter(_steps_alone, optimizers):
            found += TrialStep(subject, run, optimizer, before, ranks, closure).findings()
    return found


def tensors_outside(subject: Subject, optimizers: Optimizers) -> set[str]:
    """Returns the names of the tensors that no optimizer has, if the optimizers have others of this model."""
    if not optimizers:
        return set()
    held = _tensors_of(*optimizers)
    ours = {name for name, tensor in subject.tensors.items() if id(tensor) in held}
    if len(ours) < len(held):  # it holds strangers too: most likely stale
        return set()
    return set(subject.tensors) - ours if ours else set()


def _membership(
    subject: Subject, optimizers: Optimizers, apart: Collection[str], reached: Collection[int]
) -> Iterator[Finding]:
    held = _tensors_of(*optimizers)
    tensors = {n: t for n, t in subject.tensors.items() if t.requires_grad and t.is_leaf}
    missing = [name for name, tensor in tensors.items() if id(tensor) not in held]
    if not missing:
        return
    # A second optimizer, as in a GAN or with a separate one for the embeddings, steps what it holds.
    elsewhere = _in_other_optimizers({id(tensors[name]) for name in missing}, optimizers)
    if others := tuple(n for n in missing if id(tensors[n]) in elsewhere and n not in apart):
        kinds = sorted({type(elsewhere[id(tensors[name])]).__name__ for name in others})
        yield _loop("not-in-optimizer", EXPLAINED, others, variant="other", other=", ".join(kinds))
    missing = [name for name in missing if id(tensors[name]) not in elsewhere]
    # Tensors that neither the model has nor the loss reaches, while some of the model's own are missing:
    # replaced behind the optimizer's back. One finding for both, as they are one mistake.
    ours = {id(tensor) for tensor in subject.tensors.values()}
    strangers = [p for key, p in held.items() if key not in ours and key not in reached]
    if strangers and (replaced := _replaced(missing, apart, tensors, strangers)):
        yield _loop("stale-in-optimizer", FAULT, replaced, linked=("not-in-optimizer",), stale=len(strangers))
        missing = [name for name in missing if name not in replaced]
    if rest := tuple(name for name in missing if name not in apart):
        yield _loop("not-in-optimizer", FAULT, rest, owned=owners(rest, subject))


def _replaced(
    missing: list[str], apart: Collection[str], tensors: dict[str, Tensor], strangers: list[Tensor]
) -> tuple[str, ...]:
    """Those missing that took a stranger's place: of its shape, or beside one that is, or all else."""
    shapes = {tuple(stranger.shape) for stranger in strangers}
    alike = {name for name in missing if tuple(tensors[name].shape) in shapes}
    modules = {name.rpartition(".")[0] for name in alike}
    beside = {name for name in missing if name.rpartition(".")[0] in modules}
    rest = {name for name in missing if name not in apart}
    return tuple(name for name in missing if name in (alike | beside or rest))


def _in_other_optimizers(ids: set[int], optimizers: Optimizers) -> dict[int, Optimizer]:
    """Which of these tensors another optimizer of this process holds."""
    found = {}
    for thing in gc.get_objects():
        # Its type, not isinstance: that would ask lazy proxies for their class and wake them up.
        if issubclass(type(thing), Optimizer) and not any(thing is optimizer for optimizer in optimizers):
            found |= {key: thing for key in _tensors_of(thing) if key in ids}
    return found


def _learning_rates(optimizer: Optimizer) -> Iterator[Finding]:
    groups = [i for i, group in enumerate(optimizer.param_groups) if float(group.get("lr", 1.0)) == 0.0]
    if groups:
        # A schedule may begin or end at 0; without a schedule it stays 0.
        scheduled = all("initial_lr" in optimizer.param_groups[i] for i in groups)
        severity = EXPLAINED if scheduled else FAULT
        yield _loop("zero-lr", severity, (), n=len(groups), groups=shorten([*map(str, groups)], 6))


def _hidden(subject: Subject, run: ObservedRun, optimizers: Optimizers) -> Iterator[Finding]:
    """Parameters the loss depends on and a module holds, but in a list where nn.Module does not look."""
    if subject.module is None or run.flow is None:
        return
    known = {id(t) for t in subject.tensors.values()} | set(_tensors_of(*optimizers))
    reached = run.flow.graph.leaves
    names: dict[int, str] = {}
    for module, path in subject.module_paths().items():
        for attribute, value in vars(module).items():
            if attribute.startswith("_") or not isinstance(value, list | tuple | dict):
                continue
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                prefix = ".".join(filter(None, (path, f"{attribute}[{key!r}]")))
                for name, parameter in _parameters(item, prefix):
                    if id(parameter) in reached and id(parameter) not in known:
                        names.setdefault(id(parameter), name)
    if names:
        yield _loop("not-in-optimizer", FAULT, tuple(names.values()), variant="hidden")


def _shared(subject: Subject, run: ObservedRun, optimizers: Optimizers) -> Iterator[Finding]:
    """Parameters over one memory that are all stepped: each step moves the same numbers more than once."""
    held = _tensors_of(*optimizers)
    stepped = {
        name: tensor
        for name, tensor in subject.tensors.items()
        if id(tensor) in held and tensor.requires_grad and run.sizes.get(name) is not None
    }
    for one, other in pairs_that_overlap(stepped):
        yield _loop("shared-memory", FAULT, (one, other), one=one, other=other)


def _parameters(item: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(item, nn.Module):
        for name, parameter in item.named_parameters():
            yield f"{prefix}.{name}", parameter
    elif isinstance(item, nn.Parameter):
        yield prefix, item


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
        yield _loop("accumulating", FAULT, tuple(names), times=round(times))
    elif times > 100:
        yield _loop("unscaled-amp", EXPLAINED, tuple(names), variant="held", times=format_number(times))


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
        yield _loop("moved-while-frozen", EXPLAINED, tuple(moved), variant="statistics")


def _steps_alone(optimizer: Optimizer) -> bool:
    """Whether its step needs no closure (LBFGS does)."""
    step = inspect.unwrap(type(optimizer).step)
    needed = [
        p
        for p in list(inspect.signature(step).parameters.values())[1:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return not needed and not getattr(optimizer, "defaults", {}).get("differentiable", False)


def _loop(
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
