"""Why is it zero: the node where the gradient died, read while it happens, and what kind of node it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clinometer.gradients.diagnose.evidence import Clue
from clinometer.gradients.report.finding import EXPLAINED, FAULT, Reason, Severity
from clinometer.gradients.report.places import definition_of
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.sandbox.tensors import largest
from clinometer.gradients.trace.backward_trace import Event, Flow
from clinometer.gradients.trace.graph import Node, leaf_through, operation
from clinometer.gradients.trace.node_kinds import (
    HINGES,
    PRODUCT,
)
from clinometer.torch_internals.custom_functions import function_of
from clinometer.torch_internals.modules import Dropout
from clinometer.torch_internals.tensors import has_hooks


def why_zero(
    name: str, subject: Subject, flow: Flow, loss: float, sizes: Mapping[str, float | None]
) -> Reason:
    """Why the whole gradient of a tensor is zero; `sizes` are the largest values of all gradients."""
    node = flow.graph.leaves.get(id(subject.tensors[name]))
    origins = [] if node is None else flow.origins(node, lambda size: size == 0)
    chosen = next(((e, i) for e, i in origins if e.clues.get(i) is not None), None)
    if node is None or chosen is None:
        if node is None or not _arrived(node, flow):
            return Reason("zero", "unknown", EXPLAINED, group=0)
        if has_hooks(subject.tensors[name]):
            return Reason("zero", "zeroed", EXPLAINED, "hook", group=0)
        return Reason("zero", "structural", EXPLAINED, "cancels", group=0)
    event, position = chosen
    clue: Clue = event.clues[position]
    group: Any = event.node
    where = flow.trace.places.get(event.node) or place_above(event.node, flow)
    cause, variant, severity, values = clue.cause, clue.variant, clue.severity, dict(clue.values)
    op = where.op if where is not None else ""
    values.setdefault("op", op or operation(event.node).lower())
    nothing_learns = all(not size for size in sizes.values())
    if variant == "empty":
        group = 0  # the same for every expert that got nothing
    elif cause == "zeroed":
        where = definition_of(function_of(event.node).backward) or where
    elif cause == "zero-weight-downstream" and variant == "product":
        factor = _other_factor(event.node, position)
        silent = _silent_below(factor, flow)
        if silent is not None:
            cause, variant, severity, group = "dead-activation", "relu", FAULT, silent
            where = flow.trace.places.get(silent) or place_above(silent, flow)
            values["op"] = where.op if where is not None else "relu"
        elif (masked := _masked_below(factor, flow)) is not None:  # what it is multiplied with is the mask's
            return _masked(*masked, flow, name, sizes)
        else:
            cause, variant, severity = _zero_factor(factor, subject, values)
    elif variant == "forward" and (silent := _silent_below(event.node.next_functions[position][0], flow)):
        cause, variant, severity, group = "dead-activation", "relu", FAULT, silent  # a power of its zeros
        where = flow.trace.places.get(silent) or place_above(silent, flow)
        values["op"] = where.op if where is not None else "relu"
    elif cause == "masked" and not (nothing_learns and (event.scalar or op in HINGES)):
        return _masked(event, clue, flow, name, sizes)
    elif (
        variant != "ignored"
        and nothing_learns
        and (op in HINGES or (loss == 0 and cause in ("clamped", "dead-activation")))
    ):
        cause, variant = "zero-loss-gradient", "minimum"
    elif nothing_learns and variant in ("zero", "round", "clamp") and event.scalar:
        cause, variant = "zero-loss-gradient", "flat"
    if cause == "zero-weight-downstream" and loss == 0 and nothing_learns and _is_flat_at_zero(event.node):
        cause, variant = "zero-loss-gradient", "minimum"
    if cause == "zero-loss-gradient" and variant == "minimum":
        severity, variant = (EXPLAINED, variant) if loss == 0 else (FAULT, "flat")
    if severity == FAULT and cause in ("masked", "dead-activation") and _is_one_of_many(name, sizes):
        severity, variant, group = EXPLAINED, "choice", 0
    unweighted = cause == "zero-weight-downstream" and variant in ("product", "stacked")
    if unweighted and _is_one_of_many(name, sizes):  # the router's weight for it is zero at every token
        cause, variant, group = "absent-rows", "empty", 0
    return Reason("zero", cause, severity, variant, where, values, group)


def _masked(event: Event, clue: Clue, flow: Flow, name: str, sizes: Mapping[str, float | None]) -> Reason:
    """What was masked out, with the module or the argument that did it."""
    where = flow.trace.places.get(event.node) or place_above(event.node, flow)
    op = where.op if where is not None else ""
    values: dict[str, Any] = {"op": op or operation(event.node).lower()}
    variant, group = clue.variant, event.node
    if "dropout" in op:
        path = where.module if where is not None else ""
        module = flow.trace.module_at(path)
        variant, group = "dropout", None
        if isinstance(module, Dropout) or "dropout" in type(module).__name__.lower():
            variant, values["module"] = "dropout_module", path
            group = path
    elif variant == "attention":
        values["mask"] = flow.trace.masks.get(where and (where.file, where.line), "attn_mask")
        group = None  # every layer that runs at this line
    if _is_one_of_many(name, sizes):
        return Reason("zero", "masked", EXPLAINED, "choice", where, values, 0)
    return Reason("zero", "masked", FAULT, variant, where, values, group)


def _masked_below(factor: Node | None, flow: Flow) -> tuple[Event, Clue] | None:
    """The mask that made a factor zero, if one did: a gradient came to it and went no further."""
    weighed = False
    for below in [] if factor is None else _below(factor):
        event = flow.events.get(below)
        clues = [] if event is None else [c for c in event.clues.values() if c is not None]
        if event is not None and clues and all(clue.cause == "masked" for clue in clues):
            if weighed and clues[0].variant != "attention":
                continue
            return event, clues[0]
        if operation(below) in PRODUCT:
            if weighed:
                break
            weighed = True  # an attention's probabilities times its values, as separate calls
    return None


def _is_flat_at_zero(node: Node) -> bool:
    """Whether it is a power, a norm or a square d·d, which have their minimum at zero."""
    below = [below for below, _ in node.next_functions if below is not None]
    return operation(node) in ("Pow", "Abs", "LinalgVectorNorm") or (
        operation(node) == "Mul" and below[1:] == below[:1]
    )


def _is_one_of_many(name: str, sizes: Mapping[str, float | None]) -> bool:
    """Whether it belongs to an expert, and another expert's tensor of the same name does learn."""
    parts = name.split(".")
    if "expert" not in name.lower():
        return False
    for i, part in enumerate(parts):
        if part.isdigit():
            start, end = ".".join(parts[:i]) + ".", "." + ".".join(parts[i + 1 :])
            for other, size in sizes.items():
                if size and other.startswith(start) and other.endswith(end):
                    return True
    return False


def _silent_below(factor: Node | None, flow: Flow) -> Node | None:
    """The ReLU that made a factor zero, if one did."""
    for below in [] if factor is None else _below(factor):
        if below in flow.dead and all(bool(dead.all()) for dead in flow.dead[below]):
            return below
        if operation(below) in PRODUCT:
            break
    return None


def _zero_factor(factor: Node | None, subject: Subject, values: dict[str, Any]) -> tuple[str, str, Severity]:
    """A product whose other factor is zero: a weight that begins at zero, or an input that is."""
    if factor is None:
        return "absent-rows", "inputs", EXPLAINED
    names = {id(tensor): name for name, tensor in subject.tensors.items()}
    candidates = [leaf_through(factor)]
    for below in _below(factor):
        if operation(below) in PRODUCT:
            candidates += [leaf_through(node) for node, _ in below.next_functions]
            break
    for weight in candidates:
        if weight is not None and id(weight) in names and largest(weight.detach()) == 0:
            values["weight"] = names[id(weight)]
            stuck = weight.requires_grad and not largest(weight.grad)
            return "zero-weight-downstream", "stuck" if stuck else "named", FAULT if stuck else EXPLAINED
    return "zero-weight-downstream", "product", EXPLAINED


def _other_factor(node: Node, position: int) -> Node | None:
    """The node that made the other factor of a product; None when it is data or a constant."""
    edges = list(range(len(node.next_functions)))
    name = operation(node)
    if name in ("Addmm", "Baddbmm", "Addmv"):
        edges = edges[1:]
    elif name == "Convolution":
        edges = edges[:2]
    rest = [i for i in edges if i != position]
    return node.next_functions[rest[0]][0] if rest else None


def _below(node: Node, most: int = 24) -> list[Node]:
    found, stack = [], [node]
    while stack and len(found) < most:
        now = stack.pop(0)
        found.append(now)
        stack += [below for below, _ in now.next_functions if below is not None]
    return found


def _arrived(node: Node, flow: Flow) -> bool:
    for consumer, position in flow.above(node):
        event = flow.events.get(consumer)
        if event is None or (position < len(event.into) and event.into[position]):
            return True
    return False


def place_above(node: Node, flow: Flow) -> Any:
    """The call a node belongs to when it made several: the nearest node towards the loss that has one."""
    seen, queue = {node}, [node]
    while queue:
        for consumer, _ in flow.graph.consumers.get(queue.pop(0), ()):
            if (where := flow.trace.places.get(consumer)) is not None:
                return where
            if consumer not in seen:
                seen.add(consumer)
                queue.append(consumer)
    return None
