"""Trainable tensors that the loss reaches and neither the model lists nor an optimizer steps.

What counts is what the graph of the loss ends in, not what the module tree lists: a tensor in a plain
attribute or list, the result of `nn.Parameter(…) * 0.1` or `.to()`, a layer made in the forward, a variable,
a criterion's own parameters. As soon as an optimizer holds one, nothing is said. An input may require a
gradient too (an attack, a gradient penalty, the coordinates of a differential equation), and a network
outside the model may be fixed on purpose: only what can be neither is a fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from clinometer.gradients.diagnose.optimizer_membership import Membership, in_other_optimizers
from clinometer.gradients.report.finding import EXPLAINED, FAULT, Finding, Severity
from clinometer.gradients.report.places import Where
from clinometer.gradients.sandbox.sandbox import Before
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.trace.backward_trace import Flow
from clinometer.gradients.trace.graph import Graph
from clinometer.gradients.trace.graph_search import place_above
from clinometer.gradients.trace.holders import Holder, find_holders
from clinometer.gradients.trace.observed_run import ObservedRun


@dataclass(frozen=True)
class _Outside:
    """One such tensor, and what is concluded of it."""

    name: str
    variant: str
    severity: Severity
    where: Where | None


def find_outside(subject: Subject, run: ObservedRun, before: Before, membership: Membership) -> list[Finding]:
    """Returns a finding for each kind and line."""
    if run.flow is None:
        return []
    known = run.trace.bits.keys() | membership.held
    nodes = run.flow.graph.leaves
    unknown = {key for key in nodes if key not in known and nodes[key].variable.requires_grad}
    unknown -= in_other_optimizers(unknown, membership.optimizers).keys() if unknown else set()
    if not unknown:
        return []
    optimized = bool(membership.optimizers)
    search = _Search(subject, run, run.flow, before)
    groups: dict[Any, list[_Outside]] = {}
    for leaf in (nodes[key].variable for key in nodes if key in unknown):
        if (found := search.judge(leaf, optimized)) is not None:
            place = found.where and (found.where.file, found.where.line)
            place = None if found.variant == "hidden" else place  # one list, however many lines use it
            groups.setdefault((found.variant, found.severity, place), []).append(found)
    return [
        Finding(
            "not-in-optimizer",
            "loop",
            severity,
            "diagnosis.loop.not-in-optimizer",
            tuple(sorted({one.name for one in group})),
            group[0].where,
            variant=variant,
        )
        for (variant, severity, _), group in groups.items()
    ]


class _Search:
    """What holds a tensor, and whether it can be an input."""

    def __init__(self, subject: Subject, run: ObservedRun, flow: Flow, before: Before) -> None:
        self._subject = subject
        self._run = run
        self._flow = flow
        self._own = set(subject.module_paths())
        self._held = run.holders
        self._named = find_holders(subject.module, None)
        self._now = find_holders(subject.module, None, before.modules)
        self._inputs = set(run.trace.given)
        for tensor in run.trace.differentiated:
            self._inputs |= {id(tensor), *Graph(tensor).leaves}

    def judge(self, leaf: Tensor, optimized: bool) -> _Outside | None:
        """Returns what is concluded of a leaf; None where there is nothing to say."""
        where = place_above(self._flow.graph.leaves[id(leaf)], self._flow)
        trace = self._run.trace
        holder = self._held.get(id(leaf)) or self._registered_now(leaf)
        if id(leaf) in trace.made and id(leaf) not in self._named:
            derived = id(leaf) in trace.derived  # told as a cut, where it is one
            return None if derived else _Outside(_shape(leaf), "new", FAULT, trace.made[id(leaf)] or where)
        if holder is None and (kept := self._kept_result(leaf)) is not None:
            return self._result(leaf, kept, where, optimized)
        parameter = isinstance(leaf, nn.Parameter)
        if holder is None:
            unknown = parameter and optimized
            return _Outside(_shape(leaf), "network", EXPLAINED, where) if unknown else None
        if not parameter and id(leaf) in self._inputs:
            return None
        return self._kept(leaf, holder, where, optimized)

    def _kept(self, leaf: Tensor, holder: Holder, where: Where | None, optimized: bool) -> _Outside | None:
        """Of a leaf that a name leads to."""
        parameter = isinstance(leaf, nn.Parameter)
        if holder.root is not None and holder.root is self._subject.module:
            if holder.registered and holder.owner in self._own:
                return _Outside(holder.name, "late", FAULT if optimized else EXPLAINED, where)
            if parameter:
                return _Outside(holder.name, "hidden", FAULT, where)
            return _Outside(holder.name, "plain", FAULT if optimized else EXPLAINED, where)
        if not optimized:
            return (
                _Outside(holder.name, "beside", EXPLAINED, where)
                if parameter and not _layered(holder)
                else None
            )
        if not parameter:
            return _Outside(holder.name, "variable", EXPLAINED, where)
        if _layered(holder):
            return _Outside(holder.name, "network", EXPLAINED, where)
        return _Outside(holder.name, "outside", FAULT, where)

    def _result(self, leaf: Tensor, kept: Holder, where: Where | None, optimized: bool) -> _Outside | None:
        """Of a leaf that nobody keeps: only what was computed from it is kept."""
        inside = kept.root is not None and kept.root is self._subject.module
        if isinstance(leaf, nn.Parameter) or (inside and id(kept.tensor) not in self._inputs):
            return _Outside(kept.name, "computed", FAULT, where)
        if not optimized or id(kept.tensor) in self._inputs:
            return None
        return _Outside(kept.name, "variable", EXPLAINED, where)

    def _registered_now(self, leaf: Tensor) -> Holder | None:
        """A parameter of a module that no name of the closure leads to, but that was called."""
        holder = self._now.get(id(leaf))
        return holder if holder is not None and isinstance(leaf, nn.Parameter) else None

    def _kept_result(self, leaf: Tensor) -> Holder | None:
        for holder in self._held.values():
            if holder.tensor.grad_fn is not None and id(leaf) in Graph(holder.tensor).leaves:
                return holder
        return None


def _layered(holder: Holder) -> bool:
    """Whether it belongs to a network, with layers of torch's own: that may be fixed on purpose."""
    return holder.root is not None and any(
        type(part).__module__.startswith("torch.nn.") and any(True for _ in part.parameters(recurse=False))
        for part in holder.root.modules()
        if not isinstance(part, nn.ParameterList | nn.ParameterDict)
    )


def _shape(leaf: Tensor) -> str:
    return f"{type(leaf).__name__}{list(leaf.shape)}"
