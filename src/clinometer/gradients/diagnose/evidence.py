"""Evidence: what a node that zeroed or spoilt a gradient looks like, read while the backward runs through it.

`read_clue` asks the rules of `ZERO_EVIDENCE` or of `NONFINITE_EVIDENCE` in their order; the first that
returns a clue decides (of NaN and infinity: `singular_points`). No verdict is drawn here: `why_zero`
and `why_nonfinite` do that once the whole backward is known. To add a rule, write a function of a `NodeView`
and put its name in the tuple.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clinometer.gradients.diagnose.operation_view import Clue, OperationView, canonical
from clinometer.gradients.diagnose.singular_points import singular_point
from clinometer.gradients.report.finding import EXPLAINED, FAULT
from clinometer.gradients.sandbox.tensors import largest
from clinometer.gradients.trace.backward_trace import Read
from clinometer.gradients.trace.graph import Node, operation
from clinometer.gradients.trace.node_kinds import CLAMP, LOSS, MASK, PICK, PRODUCT, RELU, SMOOTH, STEP, SUM
from clinometer.torch_internals.custom_functions import carries_module_hooks, function_of
from clinometer.torch_internals.nodes import shape_into


@dataclass(frozen=True)
class NodeView:
    """A node while the backward runs through it, and the one of its inputs that is asked about."""

    node: Node
    position: int
    """Which input."""
    handed_on: Tensor
    """The gradient that the node hands to that input: zeros, NaN or infinity."""
    arrived: Tensor | None
    """The gradient of the node's first output that has one."""
    saved: Read

    @property
    def name(self) -> str:
        """The operation, as in `node_kinds`: "Relu"."""
        return operation(self.node)

    @property
    def arrived_size(self) -> float:
        """The largest absolute value of `arrived`."""
        return largest(self.arrived) or 0.0

    @property
    def dtype(self) -> str:
        """The number type of `handed_on`: "float16"."""
        return str(self.handed_on.dtype).removeprefix("torch.")


EvidenceRule = Callable[[NodeView], Clue | None]


def read_clue(
    node: Node,
    position: int,
    into: Sequence[Tensor | None],
    out: Sequence[Tensor | None],
    saved: Read,
) -> Clue | None:
    """Returns what the node looks like that handed on zeros, NaN or infinity for its input `position`.

    None if it handed on no gradient at all, which is for `why_none` to explain.
    """
    handed_on = into[position]
    if handed_on is None:
        return None
    arrived = next((g for g in out if g is not None), None)
    finite = math.isfinite(largest(handed_on) or 0.0)
    if arrived is None and not finite:
        return None
    view = NodeView(node, position, handed_on, arrived, saved)
    rules = ZERO_EVIDENCE if finite else NONFINITE_EVIDENCE
    return next((clue for rule in rules if (clue := rule(view)) is not None), None)


# ---- zeros ----


def no_entries(view: NodeView) -> Clue | None:
    """A gradient of shape (0, …) says that nothing was computed: an expert that got no token."""
    return Clue("absent-rows", "empty", EXPLAINED) if view.handed_on.numel() == 0 else None


def written_from_no_entries(view: NodeView) -> Clue | None:
    """The same where experts write into one tensor, o[mask] = …, and every mask so far was empty."""
    if view.name == "IndexPut" and view.position == 0 and _only_empty_below(view.node):
        return Clue("absent-rows", "empty", EXPLAINED)
    return None


def custom_backward_zeros(view: NodeView) -> Clue | None:
    """A custom Function's backward is the user's code: the zeros are its result, whatever it computes."""
    function = function_of(view.node)
    return None if function is None else Clue("zeroed", "function", FAULT, (("function", function.__name__),))


def smaller_than_the_type_holds(view: NodeView) -> Clue | None:
    """Where a number arrived that the result's type rounds to 0, the type is the cause, not the operation."""
    return Clue("underflow", "", FAULT, (("dtype", view.dtype),)) if _underflows(view) else None


def loss_function(view: NodeView) -> Clue | None:
    """A loss has a zero gradient at its minimum, and where it ignores every target."""
    if view.name not in LOSS:
        return None
    return Clue("zero-loss-gradient", "ignored" if _all_ignored(view.saved) else "minimum")


def attention_to_nothing(view: NodeView) -> Clue | None:
    """An attention whose mask hides every position from every query returns zeros for whatever goes in."""
    return Clue("masked", "attention") if _attends_to_nothing(view.name, view.saved) else None


def relu_below_zero(view: NodeView) -> Clue | None:
    """A ReLU passes nothing where its input is negative."""
    return Clue("dead-activation", "relu") if view.name in RELU else None


def softmax_over_one(view: NodeView) -> Clue | None:
    """A softmax over a dimension of size 1 is 1 whatever goes in."""
    if (
        "Softmax" in view.name
        and view.arrived is not None
        and _runs_over_one(view.arrived, view.saved("dim"))
    ):
        return Clue("dead-activation", "single")
    return None


def saturated_activation(view: NodeView) -> Clue | None:
    """A smooth activation has a zero derivative only far out, where it is flat to the last digit."""
    return Clue("dead-activation", "saturated") if view.name in SMOOTH else None


def clamped_outside(view: NodeView) -> Clue | None:
    """A clamp passes nothing outside its limits."""
    return Clue("clamped", "clamp") if view.name in CLAMP else None


def step_function(view: NodeView) -> Clue | None:
    """Rounding and signs are flat everywhere."""
    return Clue("clamped", "round") if view.name in STEP else None


def mask_operation(view: NodeView) -> Clue | None:
    """masked_fill, where and dropout pass nothing at the entries they replace."""
    return Clue("masked", "mask") if view.name in MASK else None


def picked_elsewhere(view: NodeView) -> Clue | None:
    """Indexing hands gradients to the entries it picked, and zeros to all others."""
    return Clue("absent-rows", "none", EXPLAINED) if view.name in PICK else None


def part_of_a_whole(view: NodeView) -> Clue | None:
    """stack and cat hand on parts of the gradient: a part may be zero while the whole is not."""
    if view.name in ("Stack", "Cat"):
        return Clue("zero-weight-downstream", "stacked", EXPLAINED)
    return None


def times_a_constant_zero(view: NodeView) -> Clue | None:
    """A factor that nothing learns stays zero: the term was switched off, by a number or by a mask."""
    if view.name != "Mul":
        return None
    other = 1 - view.position
    learned = other < len(view.node.next_functions) and view.node.next_functions[other][0] is not None
    if learned:
        return None
    factor = view.saved("other" if view.position == 0 else "self")
    mask = isinstance(factor, Tensor) and factor.numel() > 1
    return Clue("masked", "zero_constant" if mask else "zero")


def times_a_computed_zero(view: NodeView) -> Clue | None:
    """A factor that is computed may leave zero again: `why_zero` looks for what made it."""
    if view.name in PRODUCT | {"Mul", "Div"}:
        return Clue("zero-weight-downstream", "product", EXPLAINED)
    return None


def to_the_power_of_zero(view: NodeView) -> Clue | None:
    """x⁰ is 1 whatever x is."""
    return Clue("masked", "zero", FAULT) if view.name == "Pow" and view.saved("exponent") == 0 else None


def exponential_of_very_little(view: NodeView) -> Clue | None:
    """exp is its own derivative, which is zero only where the result was rounded to 0 in the forward."""
    return Clue("underflow", "forward", EXPLAINED) if view.name in ("Exp", "Exp2") else None


def function_of_zero(view: NodeView) -> Clue | None:
    """Powers, norms and running products have a zero derivative at zero."""
    if view.name in ("Pow", "Prod", "Abs", "Cumprod", "LinalgVectorNorm"):
        return Clue("zero-weight-downstream", "forward", EXPLAINED)
    return None


def sum_that_cancels(view: NodeView) -> Clue | None:
    """A sum passes gradients on: zeros out of it are terms that cancel, as before a normalisation."""
    return Clue("structural", "cancels", EXPLAINED) if view.name in SUM else None


def unknown_operation(view: NodeView) -> Clue | None:
    """No rule knows this operation."""
    return Clue("unknown", "", EXPLAINED)


ZERO_EVIDENCE: tuple[EvidenceRule, ...] = (
    no_entries,
    written_from_no_entries,
    custom_backward_zeros,
    smaller_than_the_type_holds,
    loss_function,
    attention_to_nothing,
    relu_below_zero,
    softmax_over_one,
    saturated_activation,
    clamped_outside,
    step_function,
    mask_operation,
    picked_elsewhere,
    part_of_a_whole,
    times_a_constant_zero,
    times_a_computed_zero,
    to_the_power_of_zero,
    exponential_of_very_little,
    function_of_zero,
    sum_that_cancels,
    unknown_operation,
)


# ---- NaN and infinity ----


def custom_backward_nonfinite(view: NodeView) -> Clue | None:
    """A custom Function's backward is the user's code: what it returned is its own."""
    function = function_of(view.node)
    if function is None:
        return None
    if carries_module_hooks(function):
        return Clue("backward", "hook")
    return Clue("backward", "function", FAULT, (("function", function.__name__),))


def values_at_the_spoilt_entries(view: NodeView) -> Clue | None:
    """What is special about the values that arrive there: zero, negative, infinite, equal, too large."""
    if view.arrived is None:
        return None
    name = canonical(view.name)
    return singular_point(OperationView(name, view.saved, view.handed_on, view.arrived, view.position))


NONFINITE_EVIDENCE: tuple[EvidenceRule, ...] = (custom_backward_nonfinite, values_at_the_spoilt_entries)


# ---- what the rules ask ----


def _attends_to_nothing(name: str, saved: Read) -> bool:
    """Whether an attention's mask hides every position from every query."""
    if name == "SafeSoftmax":  # of −∞ throughout it makes zeros, where softmax makes NaN
        result = saved("result")
        return isinstance(result, Tensor) and largest(result) == 0
    if not name.startswith("ScaledDotProduct"):
        return False
    mask = next((m for m in (saved("attn_mask"), saved("attn_bias")) if isinstance(m, Tensor)), None)
    if mask is None or not mask.numel():
        return False
    return bool((~mask if mask.dtype == torch.bool else torch.isneginf(mask)).all())


def _only_empty_below(node: Node) -> bool:
    """Whether all that was written before into the same tensor (o[mask] = …) had no entry: idle experts."""
    shapes = []
    below = node.next_functions[0][0]
    while below is not None and operation(below) == "IndexPut":
        written = below.next_functions[1][0]
        if written is not None:
            shapes.append(shape_into(written, below.next_functions[1][1]))
        below = below.next_functions[0][0]
    return below is None and bool(shapes) and all(shape is not None and 0 in shape for shape in shapes)


def _runs_over_one(gradient: Tensor, dim: int | None) -> bool:
    """Whether a softmax has one value to choose from, so that its result is 1 whatever goes in."""
    if dim is None or not gradient.dim():
        return False
    return gradient.shape[dim - 2**64 if dim >= 2**63 else dim] == 1


def _underflows(view: NodeView) -> bool:
    dtype = view.handed_on.dtype
    if view.arrived is None or not dtype.is_floating_point:
        return False
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest number above zero
    if view.name == "ToCopy":
        return view.arrived_size < tiny
    if view.name in RELU | CLAMP | STEP | MASK | PICK | LOSS:
        return False
    return dtype in (torch.float16, torch.bfloat16) and view.arrived_size < 4096 * tiny


def _all_ignored(saved: Read) -> bool:
    target = saved("target")
    ignore = saved("ignore_index")
    if not isinstance(target, Tensor) or ignore is None:
        return False
    # The saved number is unsigned: −100 comes as 2⁶⁴ − 100.
    signed = ignore - 2**64 if ignore >= 2**63 else ignore
    return bool((target == signed).all()) or not math.prod(target.shape)
