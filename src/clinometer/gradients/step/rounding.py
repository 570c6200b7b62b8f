"""How far the roundings of a step can carry it: the formula again, with every result rounded as the step
rounds.

A step in float16 rounds g², v, √v and m one after the other, and what is left of a small v is a few bits,
or 0. No fixed number of ulp covers that. So the float64 replay is repeated with every intermediate result
rounded to the dtype the step computes in, once to the nearest number and a few times up or down by chance;
the spread of the outcomes is what rounding explains (Parker 1997; Vignes 1993).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TRIES = 6
_EXACT = frozenset(
    ("to", "detach", "clone", "contiguous", "abs", "neg", "sign", "clamp", "maximum", "where", "zeros_like",
     "ones_like", "full_like", "view_as_real", "reshape", "gt", "lt", "__getitem__", "expand", "max", "min")
)  # fmt: skip
"""What rounds nothing."""


def ulp(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of `dtype` at `size` ≥ 0, in float64."""
    info = torch.finfo(dtype.to_real() if dtype.is_complex else dtype)
    exponent = torch.frexp(size.nan_to_num(nan=0.0, posinf=info.max)).exponent - 1
    return torch.ldexp(torch.full_like(size, info.eps), exponent).clamp(min=info.tiny * info.eps)


class _Rounded(TorchFunctionMode):
    """Every float64 result is rounded to `dtype`: to the nearest number, or with a generator to a
    neighbour."""

    def __init__(self, dtype: torch.dtype, generator: torch.Generator | None) -> None:
        super().__init__()
        self._dtype = dtype
        self._generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        # The mode does not see what is called in here.
        if isinstance(result, Tensor) and result.dtype is torch.float64 and name not in _EXACT:
            return self._rounded(result)
        return result

    def _rounded(self, value: Tensor) -> Tensor:
        if self._generator is None:
            return value.to(self._dtype).to(torch.float64)
        shift = torch.rand(value.shape, generator=self._generator, dtype=torch.float64, device=value.device)
        moved = value + ulp(value.abs(), self._dtype) * (1.5 * shift - 0.75)
        return torch.where(value == 0, value, moved.to(self._dtype).to(torch.float64))


def spread_of_roundings(replay: Callable[[], Tensor], exact: Tensor, dtype: torch.dtype) -> Tensor:
    """For each entry the farthest that a finite rounded outcome lies from `exact`."""
    farthest = torch.zeros_like(exact)
    generator = torch.Generator(exact.device).manual_seed(0)
    for number in range(1 + _TRIES):
        with _Rounded(dtype, generator if number else None):
            found = replay()
        farthest = torch.maximum(farthest, (found - exact).abs().nan_to_num(0.0, 0.0, 0.0))
    return farthest
