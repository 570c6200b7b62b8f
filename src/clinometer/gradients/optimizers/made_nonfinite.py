"""Weights that a step itself made NaN or infinite: weight and gradient were finite before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

_NUMBERS = ("lr", "alpha", "eps", "epsilon", "weight_decay", "momentum")


@dataclass(frozen=True)
class MadeNonfinite:
    """How many entries of a tensor a step made NaN or infinite, and by which term, as far as it shows."""

    count: int
    index: tuple[int, ...]
    """The first such entry."""
    variant: str
    """"option", "state", "eps", "no_eps", "zero_gradient", "overflow", or "" if nothing of these shows."""
    values: Mapping[str, Any] = field(default_factory=dict)


def made_nonfinite(
    before: Tensor, grad: Tensor, after: Tensor, state: Mapping[str, Any], options: Mapping[str, Any]
) -> MadeNonfinite | None:
    """What a step made NaN or infinite of finite numbers; None if it made nothing so."""
    if grad.layout is not torch.strided:
        grad = grad.to_dense()
    bad = ~after.isfinite()
    if not bool(bad.any()):
        return None
    made = bad & before.isfinite() & grad.isfinite()
    if not bool(made.any()):
        return None
    first = tuple(int(i) for i in made.nonzero()[0])
    variant, values = _term(before, grad, after, made, state, options)
    return MadeNonfinite(int(made.sum()), first, variant, values)


def without_coincidence(made: Mapping[str, MadeNonfinite]) -> dict[str, MadeNonfinite]:
    """Of several tensors: a gradient of zero is no reason if the step made others NaN without one."""
    if all(one.variant for one in made.values()):
        return dict(made)
    return {
        name: replace(one, variant="") if one.variant == "zero_gradient" else one
        for name, one in made.items()
    }


def _term(
    before: Tensor,
    grad: Tensor,
    after: Tensor,
    made: Tensor,
    state: Mapping[str, Any],
    options: Mapping[str, Any],
) -> tuple[str, dict[str, Any]]:
    numbers = {key: _number(options[key]) for key in _NUMBERS if key in options}
    for key, number in numbers.items():
        if number is not None and not math.isfinite(number):
            return "option", {"option": key, "number": str(number)}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
            return "state", {"key": key}
    kinds = [
        value.dtype
        for value in (before, *state.values())
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == before.shape
    ]
    coarsest = max(kinds, key=lambda dtype: torch.finfo(dtype).tiny, default=before.dtype)
    eps = next((numbers[key] for key in ("eps", "epsilon") if numbers.get(key) is not None), None)
    if eps is not None and eps > 0 and float(torch.tensor(eps, dtype=torch.float64).to(coarsest)) == 0:
        return "eps", {"eps": f"{eps:g}", "dtype": str(coarsest).removeprefix("torch.")}
    unpushed = bool((grad[made] == 0).all())
    if eps == 0 and unpushed:
        return "no_eps", {}
    if unpushed:
        return "zero_gradient", {}
    largest = torch.finfo(after.dtype).max
    if largest < 1e6 and bool(after[made].isinf().all()):
        return "overflow", {"dtype": str(after.dtype).removeprefix("torch."), "largest": f"{largest:g}"}
    return "", {}


def _number(value: Any) -> float | None:
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError):
        return None
