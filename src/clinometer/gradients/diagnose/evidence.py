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
from functools import cached_property

import torch
from torch import Tensor

from clinometer.gradients.diagnose.operation_view import Clue, OperationView, canonical
from clinometer.gradients.diagnose.singular_points import singular_point
from clinometer.gradients.report.finding import EXPLAINED, FAULT
from clinometer.gradients.sandbox.tensors import largest
from clinometer.gradients.trace.backward_trace import SavedValues
from clinometer.gradients.trace.cancellation import ROUNDINGS, Remainder, remainder
from clinometer.gradients.trace.graph import Node, operation
from clinometer.gradients.trace.node_kinds import (
    CLAMP,
    DRAW,
    LOSS,
    MASK,
    PICK,
    PRODUCT,
    RELU,
    SMOOTH,
    STEP,
)
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
    out: Sequence[Tensor | None]
    """The gradients of the node's outputs."""
    saved: SavedValues
    roundings: float = ROUNDINGS
    """Up to how many roundings of its terms a sum counts as nothing."""

    @property
    def name(self) -> str:
        """The operation, as in `node_kinds`: "Relu"."""
        return operation(self.node)

    @property
    def arrived(self) -> Tensor | None:
        """The gradient of the node's first output that has one."""
        return next((g for g in self.out if g is not None), None)

    @cached_property
    def remainder(self) -> Remainder | None:
        """What is left of terms that cancel, if they do."""
        if not self.saved.runnable:
            return None
        return remainder(self.node, self.position, self.handed_on, self.out, self.roundings)

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
    saved: SavedValues,
    *,
    roundings: float = ROUNDINGS,
) -> Clue | None:
    """Returns what a node looks like that handed on zeros, rounding, NaN or infinity for one of its inputs.

    None if it handed on no gradient at all, which is for `why_none` to explain, or a true one.
    """
    handed_on = into[position]
    if handed_on is None:
        return None
    view = NodeView(node, position, handed_on, out, saved, roundings)
    size = largest(handed_on) or 0.0
    if view.arrived is None and not math.isfinite(size):
        return None
    rules = ZERO_EVIDENCE if size == 0 else REMAINDER_EVIDENCE if math.isfinite(size) else NONFINITE_EVIDENCE
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


def terms_that_cancel(view: NodeView) -> Clue | None:
    """Neither what arrives is zero nor the slope: the terms of this node's backward add up to zero."""
    left = view.remainder
    return (
        None if left is None else Clue("cancellation", "", FAULT, (("size", left.size), ("term", left.term)))
    )


def random_draw(view: NodeView) -> Clue | None:
    """A sample does not depend on its distribution's parameters in a way that has a slope."""
    return Clue("sampled") if view.name in DRAW else None


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
    """Rounding and signs are flat everywhere; so is a quotient rounded to a whole number."""
    steps = view.name in STEP or view.saved("rounding_mode") is not None
    return Clue("clamped", "round") if steps or (view.name, view.position) == ("Copysign", 1) else None


def nearest_entry(view: NodeView) -> Clue | None:
    """Where an image is sampled at the nearest entry, a small move of the place picks the same one."""
    nearest = view.saved("interpolation_mode") == 1 and view.position == 1
    return Clue("clamped", "nearest") if view.name.startswith("GridSampler") and nearest else None


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
    exponent = view.saved("exponent") if view.name == "Pow" and view.position == 0 else None
    if exponent is None:
        return None
    zero = largest(exponent) == 0 if isinstance(exponent, Tensor) else exponent == 0
    return Clue("masked", "zero", FAULT) if zero else None


def exponential_of_very_little(view: NodeView) -> Clue | None:
    """exp is its own derivative, which is zero only where the result was rounded to 0 in the forward."""
    return Clue("underflow", "forward", EXPLAINED) if view.name in ("Exp", "Exp2") else None


def function_of_zero(view: NodeView) -> Clue | None:
    """Powers, norms and running products have a zero derivative at zero."""
    if view.name in ("Pow", "Prod", "Abs", "Cumprod", "LinalgVectorNorm"):
        return Clue("zero-weight-downstream", "forward", EXPLAINED)
    return None


def flat_here(view: NodeView) -> Clue | None:
    """No rule knows this operation: it is flat at these values, as it hands on zeros for whatever arrives."""
    return Clue("clamped", "flat", EXPLAINED) if view.arrived is not None else None


def unknown_operation(view: NodeView) -> Clue | None:
    """Nothing can be read from this operation."""
    return Clue("unknown", "", EXPLAINED)


ZERO_EVIDENCE: tuple[EvidenceRule, ...] = (
    no_entries,
    written_from_no_entries,
    custom_backward_zeros,
    smaller_than_the_type_holds,
    random_draw,
    loss_function,
    terms_that_cancel,
    attention_to_nothing,
    relu_below_zero,
    softmax_over_one,
    saturated_activation,
    clamped_outside,
    step_function,
    nearest_entry,
    mask_operation,
    picked_elsewhere,
    part_of_a_whole,
    times_a_constant_zero,
    times_a_computed_zero,
    to_the_power_of_zero,
    exponential_of_very_little,
    function_of_zero,
    flat_here,
    unknown_operation,
)

REMAINDER_EVIDENCE: tuple[EvidenceRule, ...] = (terms_that_cancel,)


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


def _attends_to_nothing(name: str, saved: SavedValues) -> bool:
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


def _all_ignored(saved: SavedValues) -> bool:
    target = saved("target")
    ignore = saved("ignore_index")
    if not isinstance(target, Tensor) or ignore is None:
        return False
    # The saved number is unsigned: −100 comes as 2⁶⁴ − 100.
    signed = ignore - 2**64 if ignore >= 2**63 else ignore
    return bool((target == signed).all()) or not math.prod(target.shape)
