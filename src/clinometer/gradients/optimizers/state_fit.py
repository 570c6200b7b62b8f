"""Whether an optimizer's second moments belong to the tensors they are kept for.

The running mean of g² is compared with the gradient at hand, entry by entry, in logarithms. Where g is
normal with variance v, log g² − log v has the mean −1.27 and the variance π²/2. A batch whose gradients are
larger or smaller than usual shifts all tensors alike. Moments that were exchanged between tensors of one
shape, as by a state that is loaded in another order, fit each other's gradients and not their own; and only
a whole exchange is reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_KEYS = ("exp_avg_sq", "square_avg", "v")
_FEWEST = 16
"""Entries that two tensors must have in common."""
_SAMPLED = 4096
"""Entries that are compared of each tensor."""
_MEAN, _VARIANCE = -1.27, math.pi**2 / 2
_FITS = 8.0
"""Mean square beyond the variance, at most, of moments that fit: a factor of 4 in g, everywhere."""
_BETTER = 6.0
"""What another tensor's moments fit better by, at least; plus 40/√n for the scatter of n entries."""


@dataclass(frozen=True)
class Moments:
    """One tensor's gradient, the state its optimizer keeps for it, and the options of its group."""

    name: str
    grad: Tensor
    state: Mapping[str, Any]
    options: Mapping[str, Any]


def exchanged(tensors: Sequence[Moments]) -> list[tuple[str, str]]:
    """(tensor, tensor whose moments it has) for each tensor whose moments are another's; empty if all fit."""
    shapes: dict[tuple[int, ...], list[tuple[str, Tensor, Tensor]]] = {}
    for one in tensors:
        kept = next((one.state[key] for key in _KEYS if isinstance(one.state.get(key), Tensor)), None)
        if kept is None or kept.shape != one.grad.shape or kept.numel() < _FEWEST or kept.is_complex():
            continue
        if one.grad.layout is torch.strided and kept.layout is torch.strided:
            step = max(1, kept.numel() // _SAMPLED)
            squares = one.grad.detach().reshape(-1)[::step].to("cpu", torch.float64).square()
            kept = kept.detach().reshape(-1)[::step].to("cpu", torch.float64) / _correction(one)
            shapes.setdefault(tuple(one.grad.shape), []).append((one.name, squares, kept))
    return [pair for members in shapes.values() if len(members) > 1 for pair in _exchanged(members)]


def _correction(one: Moments) -> float:
    """1 − β₂ᵗ, where the state has a count and the group its betas; else 1."""
    try:
        count, beta = float(one.state["step"]), float(one.options["betas"][1])
    except (KeyError, TypeError, ValueError, IndexError):
        return 1.0
    return 1 - beta**count if count > 0 and 0 <= beta < 1 else 1.0


def _exchanged(members: list[tuple[str, Tensor, Tensor]]) -> list[tuple[str, str]]:
    g, in_g = _logarithms([g for _, g, _ in members])
    v, in_v = _logarithms([v for _, _, v in members])
    g -= _MEAN * in_g
    # Row i: the gradient of tensor i; column j: the moments kept for tensor j.
    shared = in_g @ in_v.T
    squares = (g.square() @ in_v.T - 2 * g @ v.T + in_g @ v.square().T) / shared.clamp(min=1)
    misfit = torch.where(shared >= _FEWEST, squares - _VARIANCE, math.inf)
    own = misfit.diagonal()
    best = misfit.argmin(1).tolist()
    fitting: dict[int, int] = {}
    for i, j in enumerate(best):
        fit = float(misfit[i, j])
        if not (math.isfinite(float(own[i])) and fit < _FITS):
            continue
        if float(own[i]) - fit > _BETTER + 40 / math.sqrt(float(shared[i, j])):
            fitting[i] = j
    if len(fitting) < 2 or set(fitting.values()) != set(fitting):
        return []
    # The gradient of i fits the moments kept for j: what is kept for j belongs to i.
    whose = {kept_for: owner for owner, kept_for in fitting.items()}
    return [(members[i][0], members[whose[i]][0]) for i in sorted(fitting)]


def _logarithms(many: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logarithms of what is positive and finite, 0 elsewhere; and 1 where there is one."""
    stacked = torch.stack(many)
    known = (stacked > 0) & stacked.isfinite()
    return torch.where(known, stacked, 1.0).log(), known.double()
