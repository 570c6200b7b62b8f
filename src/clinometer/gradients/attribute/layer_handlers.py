"""How each kind of layer uses a weight: one function a kind, and the two lists in which they are looked up.

    OPENERS     layers whose weights are used inside, out of a mode's sight: they are run written out
    HANDLERS    calls that multiply or add a weight: which axes are positions, and what stands beside it

To add a layer, write a handler and put its line in HANDLERS: `handler(call)` records the use by
`call.record`, `call.product`, `call.add` or `call.register`, and returns whether it did. What it leaves
unrecorded counts as unseen: that part of the gradient is the remainder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients.attribute.axes import (
    Axes,
    contracted_axes,
    einsum_axes,
    elementwise_axes,
    matmul_axes,
)
from clinometer.gradients.attribute.call_kinds import (
    ADDS,
    DIVISIONS,
    MATMULS,
    MULS,
    NEGATIONS,
    SUBTRACTIONS,
    Arguments,
    as_autocast_hands_it,
    is_number,
    normalise,
    open_up,
)
from clinometer.gradients.attribute.contraction import LookupUse, Placement, ProductUse, look_up_rows
from clinometer.gradients.attribute.convolution import (
    CONVOLUTIONS,
    TRANSPOSED,
    Convolution,
    bias_axes,
    convolution_of,
)
from clinometer.gradients.attribute.parameter_views import ParameterViews
from clinometer.gradients.attribute.partial_uses import GroupedUse
from clinometer.gradients.attribute.recurrent import CELLS, LAYERS, Gathering, open_cell, open_layer
from clinometer.gradients.report.places import Where, user_frame


@dataclass(frozen=True)
class Call:
    """One call of torch with a parameter, or what was made of one, among its arguments."""

    name: str
    w: Tensor
    """That argument."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor
    """The result; of a nested tensor its values."""
    known: ParameterViews
    register: Callable[..., None]
    """register(use, scale=1.0): this use's δ is the gradient of the result."""

    @property
    def get(self) -> Arguments:
        """The arguments, by place or name."""
        return Arguments(self.args, self.kwargs)

    @property
    def placement(self) -> Placement:
        """Where the entries of `w` lie in its parameter."""
        return self.known.placement(self.w)

    @property
    def where(self) -> Where | None:
        """The line of the user's code that made the call."""
        return user_frame(sys._getframe(1))

    def record(
        self,
        axes: Axes | None,
        x: Callable[[], Tensor] | None,
        *,
        operand: Tensor | None = None,
        scale: float = 1.0,
    ) -> bool:
        """Records y = scale · Σ x · w with these axes; `x` None means w is added. False for no axes.

        `operand`: what `x` returns, if it is there already; its axes must have the sizes of w's and y's.
        """
        if axes is None:
            return False
        sizes = dict(zip(axes.w, self.w.shape, strict=True)) | dict(zip(axes.y, self.out.shape, strict=True))
        if operand is not None:
            for axis, size in zip(axes.x, operand.shape, strict=True):
                if sizes.setdefault(axis, size) != size:
                    return False  # broadcast batch axes
        placement = self.placement
        if scale != 1.0:
            placement = replace(placement, scale=placement.scale * float(scale))
        x_axes = axes.x if x else ""
        use = ProductUse(placement, self.name, self.where, x, x_axes, axes.w, axes.y, axes.lead, sizes)
        self.register(use, float(scale))
        return True

    def product(self, x: Any, axes: Axes | None, scale: float = 1.0) -> bool:
        """Records a product of w and x, in the precision autocast multiplies them in."""
        if axes is None or not isinstance(x, Tensor):
            return False
        kept = as_autocast_hands_it(x.detach(), self.out)
        return self.record(axes, lambda: kept, operand=kept, scale=scale)

    def add(self, scale: float = 1.0) -> bool:
        """Records y = … + scale · w: every axis of y that w lacks is a position."""
        return self.record(self.elementwise_axes, None, scale=scale)

    @property
    def elementwise_axes(self) -> Axes | None:
        """The axes of w and y where they are combined entry by entry."""
        return elementwise_axes(tuple(self.w.shape), tuple(self.out.shape))


# ---- layers that are run written out ----

Opener = Callable[[Any, tuple[Any, ...], dict[str, Any], Gathering], Any]
"""opener(function, args, kwargs, gathering) → the result; None for a form that cannot be written out."""


def recurrent_layer(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], gathering: Gathering
) -> Any:
    """nn.LSTM, nn.GRU, nn.RNN: step by step."""
    return open_layer(function.__name__, args, gathering)


def recurrent_cell(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], gathering: Gathering) -> Any:
    """nn.LSTMCell, nn.GRUCell, nn.RNNCell: one step."""
    return open_cell(function.__name__, args)


def fused_cross_entropy(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], gathering: Gathering
) -> Any:
    """linear_cross_entropy: without options it is a product and a cross-entropy."""
    return open_up(function)(*args, **{**kwargs, "options": None})


OPENERS: tuple[tuple[Collection[str], Opener], ...] = (
    (LAYERS, recurrent_layer),
    (CELLS, recurrent_cell),
    (("linear_cross_entropy",), fused_cross_entropy),
)


# ---- calls that multiply or add a weight ----

Handler = Callable[[Call], bool]


def convolution(call: Call) -> bool:
    """y = w ∗ x + b, 1 to 3 dimensions, also transposed: positions are the batch and the output's places."""
    if call.w is call.get(2, "bias"):
        return call.record(bias_axes(call.name, call.out), None)
    form = convolution_of(call.name, call.get, call.out) if call.w is call.get(1, "weight") else None
    if form is None:
        return False
    x = as_autocast_hands_it(call.get(0, "input").detach(), call.out)
    call.register(Convolution(call.placement, call.name, call.where, x, **form))
    return True


def grouped_product(call: Call) -> bool:
    """y[t] = x[t] · w[g], rows t in groups: the experts of a mixture."""
    a, b, ends = call.get(0, "input", "mat_a"), call.get(1, "mat2", "mat_b"), call.get(2, "offs")
    if call.w is not b or ends is None or a.dim() != 2 or b.dim() != 3:
        return False
    call.register(GroupedUse(call.placement, call.name, call.where, a.detach(), ends.tolist()))
    return True


def linear(call: Call) -> bool:
    """y = x wᵀ + b."""
    x, weight, bias = call.get(0, "input"), call.get(1, "weight"), call.get(2, "bias")
    if call.w is bias:
        return call.add()
    return call.w is weight and call.product(x, matmul_axes(x.dim(), 2, transposed=True))


def matrix_product(call: Call) -> bool:
    """y = a b, with w on either side."""
    a, b = call.get(0, "input", "self"), call.get(1, "other", "mat2", "vec")
    return _matmul(call, b, a) if call.name == "__rmatmul__" else _matmul(call, a, b)


def matrix_product_and_sum(call: Call) -> bool:
    """y = β c + α a b: torch.addmm, torch.baddbmm."""
    a, b = call.get(1, "mat1", "batch1"), call.get(2, "mat2", "batch2")
    if call.w is call.get(0, "input"):
        return call.add(call.kwargs.get("beta", 1))
    return _matmul(call, a, b, call.kwargs.get("alpha", 1))


def einsum(call: Call) -> bool:
    """torch.einsum: of two operands as it stands; of more, the others are contracted first."""
    equation, *rest = call.args
    if not isinstance(equation, str):
        return False
    operands = list(rest[0]) if len(rest) == 1 and not isinstance(rest[0], Tensor) else rest
    mine = next((i for i, operand in enumerate(operands) if operand is call.w), 0)
    if len(operands) == 2:
        axes = einsum_axes(equation, [o.dim() for o in operands], mine)
        return axes is not None and call.product(operands[1 - mine], axes)
    found = contracted_axes(equation, len(operands), mine)
    if found is None:
        return False
    with torch.no_grad():
        kept = torch.einsum(found[0], *(o.detach() for i, o in enumerate(operands) if i != mine))
    return call.record(found[1], lambda: kept, operand=kept)


def embedding(call: Call) -> bool:
    """y = w[ids]."""
    ids, padding, by_count = (
        call.get(0, "input"),
        call.get(2, "padding_idx"),
        call.get(5, "scale_grad_by_freq"),
    )
    return _lookup(call, ids, padding, by_count)


def norm(call: Call) -> bool:
    """y = x̂ · w + b with x̂ the normalised input: layer_norm, rms_norm."""
    if call.w is not call.get(2, "weight"):
        return call.add()
    return call.record(call.elementwise_axes, normalise(call.name, call.get))


def sum_or_difference(call: Call) -> bool:
    """y = x ± w: still the weight if nothing of more axes is added, as 1 + w and W + BA; otherwise a use."""
    first = call.w is call.get(0, "input", "self")
    other = call.get(1, "other") if first else call.get(0, "input", "self")
    negative = call.name in SUBTRACTIONS and first == (call.name == "__rsub__")
    scale = (-1.0 if negative else 1.0) * (1.0 if first else float(call.kwargs.get("alpha", 1)))
    if call.out.shape == call.w.shape and (is_number(other) or other.dim() == call.w.dim() <= 2):
        return call.known.scaled(call.w, call.out, scale)
    return call.add(scale)


def entrywise_product(call: Call) -> bool:
    """y = x · w or w / x: still the weight if x is a number; a mask over the weight has no positions."""
    divides, first = call.name in DIVISIONS, call.w is call.get(0, "input", "self")
    other = call.get(1, "other") if first else call.get(0, "input", "self")
    if divides and not first:
        return False
    if is_number(other):
        return call.known.scaled(call.w, call.out, 1 / float(other) if divides else float(other))
    if call.out.shape == call.w.shape and call.w.dim() > 1:
        return False
    x, shape = other.detach(), call.out.shape
    return call.record(call.elementwise_axes, lambda: (1 / x.double() if divides else x).expand(shape))


def negation(call: Call) -> bool:
    """y = −w is still the weight."""
    return call.known.scaled(call.w, call.out, -1.0)


HANDLERS: tuple[tuple[Collection[str], Handler], ...] = (
    ((*CONVOLUTIONS, *TRANSPOSED), convolution),
    (("_grouped_mm", "grouped_mm"), grouped_product),
    (("linear",), linear),
    (MATMULS, matrix_product),
    (("addmm", "baddbmm"), matrix_product_and_sum),
    (("einsum",), einsum),
    (("embedding",), embedding),
    (("layer_norm", "rms_norm"), norm),
    (ADDS | SUBTRACTIONS, sum_or_difference),
    (MULS | DIVISIONS, entrywise_product),
    (NEGATIONS, negation),
)
OPENER_OF = {name: opener for names, opener in OPENERS for name in names}
HANDLER_OF = {name: handler for names, handler in HANDLERS for name in names}


def _matmul(call: Call, a: Tensor, b: Tensor, scale: float = 1.0) -> bool:
    if call.w is b:
        return call.product(a, matmul_axes(a.dim(), b.dim()), scale)
    return call.w is a and call.product(b, matmul_axes(b.dim(), a.dim(), first=True), scale)


def _lookup(call: Call, ids: Any, padding: Any, by_count: Any) -> bool:
    if call.w.dim() != 2 or not isinstance(ids, Tensor):
        return False
    rows, ignored, shares = look_up_rows(ids, call.w.shape[0], padding, by_count)
    call.register(LookupUse(call.placement, call.name, call.where, rows, ignored, shares))
    return True


def record_rows(call: Call, rows: Tensor) -> bool:
    """Records w[rows], indexed by a tensor: an embedding written by hand."""
    return _lookup(call, rows, None, False)


def record_penalty(call: Call) -> bool:
    """Records a loss made of the weight alone, or a penalty added to it: a use that has no positions."""
    letters = "abcdefgh"[: call.w.dim()]
    return call.record(Axes("", letters, letters, ""), None)
