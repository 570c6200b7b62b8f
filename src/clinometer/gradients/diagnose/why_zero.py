"""Why is it zero: rules that draw a verdict from the node where the gradient became zero.

The rules are asked in their order; the first that returns a reason decides. `NO_NODE_RULES` judge a tensor
for which no node was seen, `ZERO_RULES` all others, from the clue that `evidence.ZERO_EVIDENCE` read at the
node. To add a rule, write a function of a case and put its name in the tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from clinometer.gradients.diagnose.evidence import Clue
from clinometer.gradients.report.finding import EXPLAINED, FAULT, Reason, Severity
from clinometer.gradients.report.places import Where, definition_of
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.sandbox.tensors import largest
from clinometer.gradients.trace.backward_trace import Event, Flow
from clinometer.gradients.trace.graph import Node, leaf_through, operation
from clinometer.gradients.trace.graph_search import (
    factors,
    inputs,
    is_alone,
    nodes_below,
    other_factor,
    place_of,
    receives,
    silent_relu_below,
    where_paths_part,
)
from clinometer.gradients.trace.node_kinds import HINGES, PRODUCT
from clinometer.torch_internals.custom_functions import function_of
from clinometer.torch_internals.modules import Dropout
from clinometer.torch_internals.tensors import has_hooks


@dataclass(frozen=True)
class _ZeroGradient:
    """A gradient that is zero as a whole, and what the run says of it."""

    name: str
    subject: Subject
    flow: Flow
    loss: float
    sizes: Mapping[str, float | None]
    """The largest values of all gradients."""

    @property
    def leaf(self) -> Node | None:
        """The node that accumulates it."""
        return self.flow.graph.leaves.get(id(self.subject.tensors[self.name]))

    @cached_property
    def nothing_learns(self) -> bool:
        """Whether no tensor has a gradient: then the cause lies near the loss, not near this tensor."""
        return all(not size for size in self.sizes.values())

    @cached_property
    def is_idle_expert(self) -> bool:
        """Whether it belongs to an expert, and another expert's tensor of the same name does learn."""
        return _is_one_of_many(self.name, self.sizes)


@dataclass(frozen=True)
class _ZeroCase:
    """A zero gradient with the node where it became zero, and the clue that was read there."""

    gradient: _ZeroGradient
    event: Event
    position: int
    clue: Clue

    @property
    def flow(self) -> Flow:
        return self.gradient.flow

    @property
    def node(self) -> Node:
        return self.event.node

    @cached_property
    def where(self) -> Where | None:
        return place_of(self.node, self.flow)

    @property
    def op(self) -> str:
        """The call that made the node, as the user wrote it; "" if it is not known."""
        return "" if self.where is None else self.where.op

    @property
    def is_product(self) -> bool:
        return is_product(self.clue)

    @cached_property
    def factor(self) -> Node | None:
        """What the gradient was multiplied with: of a product the other factor, of x² and the like x."""
        if self.is_product:
            return other_factor(self.node, self.position)
        return self.node.next_functions[self.position][0] if self.clue.variant == "forward" else None

    @cached_property
    def zero_weight(self) -> tuple[str, bool]:
        """Of a product, the parameter of zeros that is the factor, or "", and whether it gets no gradient."""
        return _zero_weight(self.factor, self.gradient.subject) if self.is_product else ("", False)

    @property
    def values(self) -> dict[str, Any]:
        weight = {"weight": self.zero_weight[0]} if self.zero_weight[0] else {}
        return {**dict(self.clue.values), "op": self.op or operation(self.node).lower(), **weight}

    def reason(self, cause: str, variant: str, severity: Severity, group: Any = None) -> Reason:
        """A reason at this node's line; findings are grouped by the node unless a `group` is given."""
        group = self.node if group is None else group
        return Reason("zero", cause, severity, variant, self.where, self.values, group)


def why_zero(
    name: str, subject: Subject, flow: Flow, loss: float, sizes: Mapping[str, float | None]
) -> Reason:
    """Returns why the whole gradient of a tensor is zero; `sizes` are the largest values of all gradients."""
    gradient = _ZeroGradient(name, subject, flow, loss, sizes)
    lost = [] if gradient.leaf is None else flow.where_lost(gradient.leaf)
    for node, position in lost:
        clue = None if position is None else flow.events[node].clues.get(position)
        if position is not None and clue is not None:
            case = _ZeroCase(gradient, flow.events[node], position, clue)
            return next(reason for rule in ZERO_RULES if (reason := rule(case)) is not None)
    return next(reason for rule in NO_NODE_RULES if (reason := rule(gradient)) is not None)


# ---- no node was seen that made it zero ----


def zeroed_by_a_hook(gradient: _ZeroGradient) -> Reason | None:
    """A gradient that arrived and is zero in `.grad` was changed on the way by the tensor's own hook."""
    arrived = gradient.leaf is not None and receives(gradient.leaf, gradient.flow, bool)
    if not (arrived and has_hooks(gradient.subject.tensors[gradient.name])):
        return None
    return Reason("zero", "zeroed", EXPLAINED, "hook", group=0)


def paths_cancel(gradient: _ZeroGradient) -> Reason | None:
    """What comes on several paths adds up to zero, at the tensor itself or at a node above it."""
    flow, leaf = gradient.flow, gradient.leaf
    node = next((node for node, _ in flow.where_lost(leaf) if node in flow.meetings), None) if leaf else None
    if node is None:
        return None
    parting, left = where_paths_part(node, flow.graph), flow.meetings[node]
    where = place_of(parting, flow)
    if is_alone(parting) and not gradient.nothing_learns:
        return _structural(gradient, where)
    values = {"op": where.op if where else operation(parting).lower(), "size": left.size, "term": left.term}
    return Reason("zero", "cancellation", FAULT, "paths", where, values, parting)


def nothing_arrived(gradient: _ZeroGradient) -> Reason | None:
    """No node was seen to make it zero."""
    return Reason("zero", "unknown", EXPLAINED, group=0)


NO_NODE_RULES: tuple[Callable[[_ZeroGradient], Reason | None], ...] = (
    zeroed_by_a_hook,
    paths_cancel,
    nothing_arrived,
)


# ---- a node was seen ----


def expert_without_tokens(case: _ZeroCase) -> Reason | None:
    """Nothing was computed from it; one finding for all experts that got no token."""
    if case.clue.variant != "empty":
        return None
    return case.reason(case.clue.cause, "empty", case.clue.severity, group=0)


def zeros_of_a_custom_backward(case: _ZeroCase) -> Reason | None:
    """A custom Function's backward is the user's code: the place is its definition."""
    if case.clue.cause != "zeroed":
        return None
    where = definition_of(function_of(case.node).backward) or case.where
    return Reason("zero", "zeroed", case.clue.severity, case.clue.variant, where, case.values, case.node)


def zeros_of_a_dead_relu(case: _ZeroCase) -> Reason | None:
    """A product with zeros that a ReLU made is no product's fault: the ReLU is dead."""
    relu = silent_relu_below(case.factor, case.flow)
    if relu is None:
        return None
    where = place_of(relu, case.flow)
    values = {**dict(case.clue.values), "op": where.op if where is not None else "relu"}
    if case.gradient.is_idle_expert:
        return Reason("zero", "dead-activation", EXPLAINED, "choice", where, values, 0)
    return Reason("zero", "dead-activation", FAULT, "relu", where, values, relu)


def factor_is_masked(case: _ZeroCase) -> Reason | None:
    """The same for zeros that a mask made: probabilities times values, where the mask hides all."""
    found = _mask_below(case.factor, case.flow) if case.is_product else None
    return None if found is None else _masked(*found, case.gradient)


def masked_out(case: _ZeroCase) -> Reason | None:
    """A mask between the tensor and the loss; not the loss's own, which is the next rules' matter."""
    own = case.event.scalar or case.op in HINGES
    if case.clue.cause != "masked" or (case.gradient.nothing_learns and own):
        return None
    return _masked(case.event, case.clue, case.gradient)


def cancels_by_construction(case: _ZeroCase) -> Reason | None:
    """A tensor alone where terms cancel: a bias before a normalisation, a weight that is normalised.

    So are the scores of an attention whose values are all the same.
    """
    if case.clue.cause != "cancellation" or case.gradient.nothing_learns:
        return None
    harmless = is_alone(case.node.next_functions[case.position][0]) or _weighs_computed_values(case)
    return _structural(case.gradient, case.where) if harmless else None


def terms_cancel(case: _ZeroCase) -> Reason | None:
    """In one node's backward: what reads the node's result asks for just what the node keeps constant."""
    if case.clue.cause != "cancellation":
        return None
    reader = next((c for c, _ in case.flow.above(case.node)), None)
    where = None if reader is None else place_of(reader, case.flow)
    if where is None or case.where is None:
        return case.reason("cancellation", "", FAULT)
    other = (where.file, where.line) != (case.where.file, case.where.line)
    values = {**case.values, "reader": where.op, "place": where.label}
    variant = "elsewhere" if other else "read"
    return Reason("zero", "cancellation", FAULT, variant, case.where, values, case.node)


def softmax_over_one(case: _ZeroCase) -> Reason | None:
    """Also where it belongs to a loss of 0, as cross_entropy over one class does: no minimum, a constant."""
    return case.reason("dead-activation", "single", FAULT) if case.clue.variant == "single" else None


def loss_at_its_minimum(case: _ZeroCase) -> Reason | None:
    """No tensor has a gradient, and the node belongs to the loss: all margins are satisfied, or it is 0."""
    ends_in_loss = case.op in HINGES or (
        case.gradient.loss == 0 and case.clue.cause in ("clamped", "dead-activation")
    )
    if case.is_product or case.clue.variant == "ignored":
        return None
    return _minimum(case) if case.gradient.nothing_learns and ends_in_loss else None


def loss_times_zero(case: _ZeroCase) -> Reason | None:
    """No tensor has a gradient, and the loss itself was multiplied by 0, rounded or clamped: it is flat."""
    flattened = case.clue.variant in ("zero", "round", "clamp") and case.event.scalar
    if not (flattened and case.gradient.nothing_learns):
        return None
    return case.reason("zero-loss-gradient", "flat", case.clue.severity)


def square_at_its_minimum(case: _ZeroCase) -> Reason | None:
    """A loss of 0 made of squares, absolute values or norms of zeros is at its minimum."""
    times_zero = case.clue.cause == "zero-weight-downstream" and not _is_times_an_input(case)
    if (
        times_zero
        and case.gradient.loss == 0
        and case.gradient.nothing_learns
        and _is_flat_at_zero(case.node)
    ):
        return _minimum(case)
    return None


def loss_function_at_its_minimum(case: _ZeroCase) -> Reason | None:
    """A loss function of torch has a zero gradient at its minimum only; elsewhere the loss is flat."""
    is_loss = (case.clue.cause, case.clue.variant) == ("zero-loss-gradient", "minimum")
    return _minimum(case) if is_loss else None


def factor_of_zero_inputs(case: _ZeroCase) -> Reason | None:
    """A factor that is zero as it was computed from data that is zero: it is another with other data."""
    leaves = [node for node in nodes_below(case.factor) if not node.next_functions] if case.is_product else []
    lost = [edge for leaf in leaves for edge in case.flow.where_lost(leaf)]
    by_data = any(
        position is not None and is_product(clue) and other_factor(node, position) is None
        for node, position in lost
        if (clue := None if position is None else case.flow.events[node].clues.get(position)) is not None
    )
    return case.reason("absent-rows", "inputs", EXPLAINED) if by_data else None


def input_is_zero(case: _ZeroCase) -> Reason | None:
    """A product with data that is zero: the weight learns with other data."""
    return case.reason("absent-rows", "inputs", EXPLAINED) if _is_times_an_input(case) else None


def weight_is_zero(case: _ZeroCase) -> Reason | None:
    """A product with a weight of zeros, as LoRA's B; stuck if that weight gets no gradient either."""
    weight, stuck = case.zero_weight
    if not weight:
        return None
    return case.reason(case.clue.cause, "stuck" if stuck else "named", FAULT if stuck else EXPLAINED)


def expert_with_weight_zero(case: _ZeroCase) -> Reason | None:
    """The router's weight for this expert is zero at every token: as if it had got none."""
    unweighted = case.is_product or (case.clue.cause, case.clue.variant) == (
        "zero-weight-downstream",
        "stacked",
    )
    if not (unweighted and case.gradient.is_idle_expert):
        return None
    return case.reason("absent-rows", "empty", case.clue.severity, group=0)


def dead_in_an_idle_expert(case: _ZeroCase) -> Reason | None:
    """A dead activation in one expert, while the same weight of another one learns, is a matter of choice."""
    fault = case.clue.cause == "dead-activation" and case.clue.severity == FAULT
    if not (fault and case.gradient.is_idle_expert):
        return None
    return case.reason("dead-activation", "choice", EXPLAINED, group=0)


def as_the_node_looks(case: _ZeroCase) -> Reason | None:
    """What the clue says."""
    return case.reason(case.clue.cause, case.clue.variant, case.clue.severity)


ZERO_RULES: tuple[Callable[[_ZeroCase], Reason | None], ...] = (
    expert_without_tokens,
    zeros_of_a_custom_backward,
    zeros_of_a_dead_relu,
    factor_is_masked,
    masked_out,
    cancels_by_construction,
    terms_cancel,
    softmax_over_one,
    loss_at_its_minimum,
    loss_times_zero,
    square_at_its_minimum,
    loss_function_at_its_minimum,
    input_is_zero,
    factor_of_zero_inputs,
    weight_is_zero,
    expert_with_weight_zero,
    dead_in_an_idle_expert,
    as_the_node_looks,
)


# ---- what the rules share ----


def is_product(clue: Clue) -> bool:
    """Whether a node multiplied the gradient with a zero that may change."""
    return (clue.cause, clue.variant) == ("zero-weight-downstream", "product")


def _weighs_computed_values(case: _ZeroCase) -> bool:
    """Whether it is a softmax, with or within a product of its result and values that are computed."""
    if operation(case.node).startswith("ScaledDotProduct"):
        return case.position < 2
    products = [(c, i) for c, i in case.flow.above(case.node) if operation(c) in PRODUCT]
    return "Softmax" in operation(case.node) and any(other_factor(c, i) is not None for c, i in products)


def _structural(gradient: _ZeroGradient, where: Where | None) -> Reason:
    exact = not largest(gradient.subject.tensors[gradient.name].grad)
    return Reason("zero", "structural", EXPLAINED, "cancels" if exact else "", where, group=0)


def _minimum(case: _ZeroCase) -> Reason:
    """Explained at a loss of exactly 0; at any other value the loss does not depend on what goes in."""
    if case.gradient.loss == 0:
        return case.reason("zero-loss-gradient", "minimum", EXPLAINED)
    return case.reason("zero-loss-gradient", "flat", FAULT)


def _masked(event: Event, clue: Clue, gradient: _ZeroGradient) -> Reason:
    """What was masked out, with the module or the argument that did it."""
    where = place_of(event.node, gradient.flow)
    op = where.op if where is not None else ""
    values: dict[str, Any] = {"op": op or operation(event.node).lower()}
    variant, group = clue.variant, event.node
    if "dropout" in op:
        path = where.module if where is not None else ""
        module = gradient.flow.trace.module_at(path)
        variant, group = "dropout", None
        if isinstance(module, Dropout) or "dropout" in type(module).__name__.lower():
            variant, values["module"] = "dropout_module", path
            group = path
    elif variant == "attention":
        values["mask"] = gradient.flow.trace.masks.get(where and (where.file, where.line), "attn_mask")
        group = None  # every layer that runs at this line
    if gradient.is_idle_expert:
        return Reason("zero", "masked", EXPLAINED, "choice", where, values, 0)
    return Reason("zero", "masked", FAULT, variant, where, values, group)


def _mask_below(factor: Node | None, flow: Flow) -> tuple[Event, Clue] | None:
    """The mask that made a factor zero, if one did: a gradient came to it and went no further."""
    weighed = False
    for below in nodes_below(factor):
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


def _zero_weight(factor: Node | None, subject: Subject) -> tuple[str, bool]:
    """The name of the parameter of zeros that is the factor, or a factor of it; and whether it is stuck."""
    names = {id(tensor): name for name, tensor in subject.tensors.items()}
    candidates = [leaf_through(factor)]
    product = next((below for below in nodes_below(factor) if operation(below) in PRODUCT), None)
    if product is not None:
        candidates += [leaf_through(node) for node in factors(product)]
    for weight in candidates:
        if weight is not None and id(weight) in names and largest(weight.detach()) == 0:
            return names[id(weight)], weight.requires_grad and not largest(weight.grad)
    return "", False


def _is_times_an_input(case: _ZeroCase) -> bool:
    """Whether the other factor of a product is data: nothing learned made it, and no derivative."""
    return case.is_product and case.factor is None and case.op != "grad"


def _is_flat_at_zero(node: Node) -> bool:
    """Whether it is a power, a norm or a square d·d, which have their minimum at zero."""
    below = inputs(node)
    return operation(node) in ("Pow", "Abs", "LinalgVectorNorm") or (
        operation(node) == "Mul" and below[1:] == below[:1]
    )


def _is_one_of_many(name: str, sizes: Mapping[str, float | None]) -> bool:
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
