"""Evidence: what a node that swallowed or spoilt a gradient looks like, read while the backward passes it.

Nothing is concluded here: `why_zero` and `why_nonfinite` draw the reason, when all of the backward is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients.report.finding import EXPLAINED, FAULT, Severity
from clinometer.gradients.sandbox.tensors import largest
from clinometer.gradients.trace.backward_trace import Read
from clinometer.gradients.trace.graph import Node, is_custom, operation
from clinometer.gradients.trace.node_kinds import CLAMP, LOSS, MASK, PICK, PRODUCT, RELU, SMOOTH, STEP, SUM
from clinometer.torch_internals.custom_functions import function_of
from clinometer.torch_internals.nodes import shape_into

TRAPS = {
    "Sqrt": "sqrt", "Rsqrt": "sqrt", "Pow": "pow", "LinalgVectorNorm": "norm", "Norm": "norm",
    "Cdist": "norm", "PairwiseDistance": "norm", "Log": "log", "Log2": "log", "Log10": "log",
    "Log1P": "log", "Xlogy": "log", "Div": "division", "Reciprocal": "division", "Acos": "acos",
    "Asin": "acos", "Atanh": "acos", "Acosh": "acos", "Std": "std", "Var": "std", "StdMean": "std",
    "Logsumexp": "softmax", "Softmax": "softmax", "LogSoftmax": "softmax", "Logit": "log",
    "BinaryCrossEntropy": "log", "Atan2": "division", "Prod": "division", "Cumprod": "division",
    "LinalgMatrixNorm": "norm", "Hypot": "norm",
}  # fmt: skip


@dataclass(frozen=True)
class Clue:
    """What a node that swallowed a gradient looks like."""

    cause: str
    variant: str = ""
    severity: Severity = FAULT
    values: tuple[tuple[str, Any], ...] = ()


def read_clue(
    node: Node,
    position: int,
    into: Sequence[Tensor | None],
    out: Sequence[Tensor | None],
    saved: Read,
) -> Clue | None:
    """What the node looks like that handed on zeros, NaN or infinity for its input `position`."""
    size = largest(into[position])
    if size is not None and not math.isfinite(size):
        return _why_nonfinite(node, position, into, out)
    return _why_zero(node, position, into, out, saved)


def _why_zero(
    node: Node,
    position: int,
    into: Sequence[Tensor | None],
    out: Sequence[Tensor | None],
    saved: Read,
) -> Clue | None:
    """The cause, from the kind of node and what it saved; called while the backward passes it."""
    if into[position] is None:
        return None
    name = operation(node)
    gradient = next((g for g in out if g is not None), None)
    size = largest(gradient) or 0.0
    if into[position].numel() == 0:  # pyright: ignore[reportOptionalMemberAccess]
        return Clue("absent-rows", "empty", EXPLAINED)
    if name == "IndexPut" and position == 0 and _only_empty_below(node):
        return Clue("absent-rows", "empty", EXPLAINED)
    if is_custom(node):
        return Clue("zeroed", "function", FAULT, (("function", function_of(node).__name__),))
    if _underflows(name, into[position], gradient, size):
        return Clue("underflow", "", FAULT, (("dtype", str(_dtype(into[position])).removeprefix("torch.")),))
    if name in LOSS:
        return Clue("zero-loss-gradient", "ignored" if _all_ignored(saved) else "minimum")
    if _attends_to_nothing(name, saved):
        return Clue("masked", "attention")
    if name in RELU:
        return Clue("dead-activation", "relu")
    if "Softmax" in name and gradient is not None and _runs_over_one(gradient, saved("dim")):
        return Clue("dead-activation", "single")
    if name in SMOOTH:
        return Clue("dead-activation", "saturated")
    if name in CLAMP:
        return Clue("clamped", "clamp")
    if name in STEP:
        return Clue("clamped", "round")
    if name in MASK:
        return Clue("masked", "mask")
    if name in PICK:
        return Clue("absent-rows", "none", EXPLAINED)
    if name in ("Stack", "Cat"):  # the zeros came as a part of a gradient that is not zero as a whole
        return Clue("zero-weight-downstream", "stacked", EXPLAINED)
    if name == "Mul":
        return _product_with(node, position, saved)
    if name in PRODUCT or name == "Div":
        return Clue("zero-weight-downstream", "product", EXPLAINED)
    if name == "Pow" and saved("exponent") == 0:
        return Clue("masked", "zero", FAULT)
    if name in ("Exp", "Exp2", "Pow", "Prod", "Abs", "Cumprod", "LinalgVectorNorm"):
        return Clue("underflow" if name.startswith("Exp") else "zero-weight-downstream", "forward", EXPLAINED)
    return Clue("structural", "cancels", EXPLAINED) if name in SUM else Clue("unknown", "", EXPLAINED)


def _why_nonfinite(
    node: Node, position: int, into: Sequence[Tensor | None], out: Sequence[Tensor | None]
) -> Clue | None:
    """What a node that turned a finite gradient into NaN or infinity looks like."""
    gradient, bad = next((g for g in out if g is not None), None), into[position]
    if bad is None or gradient is None:
        return None
    name = operation(node)
    if is_custom(node):
        return Clue("backward", "function", FAULT, (("function", function_of(node).__name__),))
    trap = TRAPS.get(name, "")
    if not trap and bool(torch.isinf(bad).any()):
        return Clue("overflow", "backward", FAULT, (("dtype", str(bad.dtype).removeprefix("torch.")),))
    masked = False
    if bad.shape == gradient.shape:
        wrong = ~torch.isfinite(bad)
        masked = bool((gradient[wrong] == 0).all())
    return Clue("backward", "where" if masked else trap or "other")


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


def _product_with(node: Node, position: int, saved: Read) -> Clue:
    """A product with zero: with a constant it was switched off, with something learned it may come back."""
    other = 1 - position
    below = node.next_functions[other][0] if other < len(node.next_functions) else None
    if below is None:
        factor = saved("other" if position == 0 else "self")
        if isinstance(factor, Tensor) and factor.numel() > 1:
            return Clue("masked", "zero_constant")
        return Clue("masked", "zero")
    return Clue("zero-weight-downstream", "product", EXPLAINED)


def _underflows(name: str, into: Tensor | None, out: Tensor | None, size: float) -> bool:
    """Whether a number was there that the type of the result cannot hold."""
    dtype = _dtype(into)
    if out is None or dtype is None or not dtype.is_floating_point:
        return False
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest number above zero
    if name == "ToCopy":
        return size < tiny
    if name in RELU | CLAMP | STEP | MASK | PICK | LOSS:
        return False
    return dtype in (torch.float16, torch.bfloat16) and size < 4096 * tiny


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _all_ignored(saved: Read) -> bool:
    target = saved("target")
    ignore = saved("ignore_index")
    if not isinstance(target, Tensor) or ignore is None:
        return False
    # The saved number is unsigned: −100 comes as 2⁶⁴ − 100.
    signed = ignore - 2**64 if ignore >= 2**63 else ignore
    return bool((target == signed).all()) or not math.prod(target.shape)
