"""A tensor computed from parameters alone: exp(t), a normalised weight, a pruned one.

Its uses are uses of the parameter. With w' = f(w) and J the derivative of f, what a position adds to ∂L/∂w
along a direction v is what it adds to ∂L/∂w' along J v; one entry is the direction that is 1 there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp

from clinometer.gradients.attribute.contraction import Placement
from clinometer.gradients.report.formatting import words
from clinometer.gradients.sandbox.tensors import tensors_in

ELEMENTWISE = words(
    """
    exp exp2 expm1 log log2 log1p sigmoid tanh softplus square sqrt rsqrt reciprocal pow __pow__ abs relu
    sin cos gelu silu elu leaky_relu logsigmoid hardtanh hardsigmoid mul __mul__ __rmul__ multiply div
    __truediv__ true_divide neg where masked_fill tril triu clamp clamp_min clamp_max erf sign
    """
)
PURE = ELEMENTWISE | words(
    """
    softmax log_softmax normalize sum mean norm vector_norm linalg_vector_norm linalg_norm norm_except_dim
    _weight_norm matrix_exp linalg_matrix_exp add sub __add__ __sub__ __radd__ __rsub__ __rtruediv__
    __rpow__ rdiv cumsum amax amin logsumexp std var prod outer
    """
)
"""Functions without random numbers that make a weight of a weight."""


@dataclass(eq=False)
class ParameterFunction(Placement):
    """How w' = f(w) hangs on a parameter."""

    parent: Placement | None = None
    function: Callable[[Tensor], Tensor] | None = None
    primal: Tensor | None = None
    elementwise: bool = False

    @property
    def plain(self) -> bool:
        return False

    def spread(self, values: Tensor) -> Tensor:
        """J v, for values v of the parameter's shape; the parent's scale is in it, this one's is not."""
        assert self.parent is not None
        assert self.primal is not None
        return self._pushed(self.parent.scale * self.parent.spread(values))

    @property
    def slopes(self) -> Tensor | None:
        """dw'/dw entry by entry, where f acts on each by itself and the parent is the parameter."""
        if not self.elementwise or type(self.parent) is not Placement or self.parent.positions is not None:
            return None
        assert self.primal is not None
        slopes = self._pushed(torch.full(self.primal.shape, self.parent.scale, dtype=torch.float64))
        return slopes if slopes.shape == self.primal.shape else None

    def _pushed(self, direction: Tensor) -> Tensor:
        assert self.function is not None
        assert self.primal is not None
        primal = self.primal.double()
        direction = direction.to(primal.device, torch.float64)
        with torch.enable_grad():
            try:
                return jvp(self.function, (primal,), (direction,))[1].detach()
            except (RuntimeError, NotImplementedError):  # no forward derivative: that of u ↦ Jᵀu, which is J
                out, back, *_ = vjp(self.function, primal)
                zeros = torch.zeros_like(out)
                return vjp(lambda u: back(u)[0], zeros)[1](direction)[0].detach()


def function_of(
    func: Callable[..., Any], args: Any, kwargs: Any, tensor: Tensor, part: int | None = None
) -> Callable[[Tensor], Tensor]:
    """The call as a function of one of its arguments, the others held as they were, in float64."""
    held = {id(t): t.detach().clone() for t in tensors_in(args, kwargs) if t is not tensor}

    def apply(value: Tensor) -> Tensor:
        def put(item: Any) -> Any:
            if item is tensor:
                return value
            if isinstance(item, Tensor):
                kept = held[id(item)]
                return kept.double() if kept.is_floating_point() else kept
            if isinstance(item, dict):
                return {key: put(inner) for key, inner in item.items()}
            return type(item)(put(inner) for inner in item) if type(item) in (tuple, list) else item

        out = func(*put(args), **put(kwargs))
        return out if part is None else out[part]

    return apply
