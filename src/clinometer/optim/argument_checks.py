"""The checks that every optimizer and schedule makes of its numbers."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from clinometer.messages import InputError


def require_nonnegative(name: str, value: Any, usual: str) -> None:
    """Raise `InputError` unless `value` is a finite number ≥ 0 (a one-element tensor counts as a number)."""
    if not (_is_number(value) and math.isfinite(value) and value >= 0):
        raise InputError("optim.nonnegative", name=name, value=value, usual=usual)


def require_fraction(name: str, value: Any, usual: str) -> None:
    """Raise `InputError` unless 0 ≤ `value` < 1."""
    if not (_is_number(value) and 0 <= value < 1):
        raise InputError("optim.fraction", name=name, value=value, usual=usual)


def require_betas(betas: Any) -> None:
    """Raise `InputError` unless `betas` is a pair (β₁, β₂) with both in [0, 1)."""
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
        raise InputError("optim.betas", value=betas)
    require_fraction("betas[0]", betas[0], "0.9")
    require_fraction("betas[1]", betas[1], "0.999")


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float)) and not isinstance(value, bool)
