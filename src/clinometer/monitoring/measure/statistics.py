"""The statistics of one tensor in one step (clinometer.vocabulary), on the host.

A tensor is read once, in pieces that fit a core's cache: all sums over one piece come before the next, so
memory is paid for one pass and not for five. Sums over a piece are float32 (dot products: many accumulators,
error below 1e-5), sums over pieces are Python's float64. Squares leave float32's range from |g| ≈ 1e19 on and
below 1e-19: such a piece is added up in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clinometer.distributed.sharded_tensors import local
from clinometer.monitoring.measure.histograms import count_into, count_zeros

PIECE = 1 << 17
"""Entries looked at together: with the scratch 1 to 1.5 MiB, shared by two cores' caches."""

LARGEST = float(np.finfo(np.float32).max)
TRUSTED = (1e-12, 1e15)
"""Within these bounds the squares of a piece's largest entry, and their sum, are ordinary float32 numbers."""
TRUSTED_SQUARE = (1e-24, 1e30)


class OfGradient(NamedTuple):
    """The statistics of one gradient and its first moment, in the order of the vocabulary."""

    norm: float
    largest: float
    zeros: float
    nonfinite: float
    cosine: float
    moment_norm: float


class OfWeight(NamedTuple):
    """The statistics of one weight and its last update, in the order of the vocabulary."""

    norm: float
    update_norm: float


class Scratch:
    """Room for one piece in each precision, made once."""

    def __init__(self) -> None:
        self._rooms: dict[tuple[str, torch.dtype], Tensor] = {}

    def room(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        room = self._rooms.get((name, dtype))
        if room is None:
            room = self._rooms[name, dtype] = torch.empty(PIECE, dtype=dtype, device="cpu")
        return room[:size]

    def wide(self, name: str, piece: Tensor) -> Tensor:
        """The piece in float32 or float64: half precision is copied, the others are as they are."""
        if piece.dtype in (torch.float32, torch.float64):
            return piece
        return self.room(name, piece.numel(), torch.float32).copy_(piece)


def flat(tensor: Tensor) -> Tensor:
    """Its entries in one row: a view where that is possible. A complex tensor gives its real parts beside
    its imaginary ones, a sparse one what it stores, a sharded one its part here."""
    tensor = local(tensor).detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.reshape(-1)


def measure_gradient(
    grad: Tensor, moment: Tensor | None, scratch: Scratch, counts: np.ndarray | None = None
) -> OfGradient:
    """The gradient's statistics; its histogram is added to `counts` [64] if one is given.

    A gradient that is not finite has the norm and the largest entry +inf and no cosine. A sparse gradient
    counts the entries that it does not store as zeros.
    """
    if grad.is_complex() or grad.layout is not torch.strided:
        return _unusual(grad, moment, scratch, counts)
    values = flat(grad)
    m = None if moment is None or moment.shape != grad.shape else flat(moment)
    size = values.numel()
    square = product = moment_square = largest = 0.0
    zeros = nonfinite = 0
    for start in range(0, size, PIECE):
        piece = values if size <= PIECE else values[start : start + PIECE]
        g = scratch.wide("g", piece)
        magnitude = torch.abs(g, out=scratch.room("abs", g.numel(), g.dtype))
        low, high = (float(x) for x in torch.aminmax(magnitude))
        if not low > 0:  # also when it is NaN
            zeros += count_zeros(g, scratch)
        if not math.isfinite(high):
            nonfinite += g.numel() - int(torch.isfinite(g).sum())
            high = math.inf
        largest = max(largest, high)
        if high > 0:
            square += _square(g, high)
        if counts is not None:
            count_into(counts, g, scratch)
        if m is not None:
            part = scratch.wide("m", m if size <= PIECE else m[start : start + PIECE])
            moment_square += _dot(part, part)
            if high > 0:
                product += _dot(g, part.to(g.dtype), small_is_fine=high >= TRUSTED[0])
    return _finished(
        size,
        zeros=zeros,
        nonfinite=nonfinite,
        largest=largest,
        square=square,
        product=product,
        moment_square=moment_square if m is not None else None,
    )


def measure_weight(
    weight: Tensor,
    before: Tensor,
    scratch: Scratch,
    counts: tuple[np.ndarray, np.ndarray] | None = None,
) -> OfWeight:
    """‖θ‖ and ‖θ − before‖; `before` [numel], a flat copy of θ in its own precision, is θ afterwards.

    With `counts`, the histograms of the weight and of its update are added to the first and the second.
    """
    values = flat(weight)
    size = values.numel()
    square = moved = 0.0
    for start in range(0, size, PIECE):
        new = values if size <= PIECE else values[start : start + PIECE]
        old = before if size <= PIECE else before[start : start + PIECE]
        wide = scratch.wide("g", new)
        difference = scratch.wide("m", old).sub_(wide)  # in `before` itself, which is overwritten below
        moved += _dot(difference, difference)
        square += _dot(wide, wide)
        if counts is not None:
            count_into(counts[0], wide, scratch)
            count_into(counts[1], difference, scratch)
        old.copy_(new)
    return OfWeight(_norm(square), _norm(moved))


def _square(g: Tensor, largest: float) -> float:
    if TRUSTED[0] < largest < TRUSTED[1]:
        return float(torch.dot(g, g))
    if largest == math.inf:
        return math.inf
    wide = g.double()
    return float(torch.dot(wide, wide))


def _dot(a: Tensor, b: Tensor, *, small_is_fine: bool = False) -> float:
    """⟨a, b⟩, in float64 where float32's result may have lost something."""
    product = float(torch.dot(a, b))
    if small_is_fine and abs(product) < TRUSTED_SQUARE[1]:
        return product
    if a.dtype == torch.float64 or TRUSTED_SQUARE[0] < abs(product) < TRUSTED_SQUARE[1]:
        return product
    return float(torch.dot(a.double(), b.double()))


def _norm(square: float) -> float:
    """The root; what float32 cannot hold though it is finite becomes its largest number, and NaN +inf."""
    if not math.isfinite(square):
        return math.inf
    return min(math.sqrt(square), LARGEST)


def _finished(
    size: int,
    *,
    zeros: int,
    nonfinite: int,
    largest: float,
    square: float,
    product: float,
    moment_square: float | None,
) -> OfGradient:
    share = zeros / size if size else 0.0
    moment_norm = math.nan if moment_square is None else _norm(moment_square)
    if nonfinite:
        return OfGradient(math.inf, math.inf, share, nonfinite, math.nan, moment_norm)
    norm = _norm(square) if square < math.inf else LARGEST
    cosine = math.nan
    if moment_square is not None and 0 < square < math.inf and 0 < moment_square < math.inf:
        cosine = max(-1.0, min(1.0, product / math.sqrt(square) / math.sqrt(moment_square)))
    return OfGradient(norm, min(largest, LARGEST), share, 0, cosine, moment_norm)


def _unusual(grad: Tensor, moment: Tensor | None, scratch: Scratch, counts: np.ndarray | None) -> OfGradient:
    """Complex and sparse gradients: the same numbers by the same sums, with copies."""
    dense = grad.detach() if grad.layout is torch.strided else grad.detach().to_dense()
    parts = measure_gradient(
        torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense,
        None
        if moment is None or moment.shape != grad.shape
        else torch.view_as_real(moment.detach().resolve_conj())
        if moment.is_complex()
        else moment,
        scratch,
        counts,
    )
    if not dense.is_complex():
        return parts
    # An entry is one complex number: its modulus counts, not its parts.
    moduli = dense.abs()
    zeros = 1 - int(torch.count_nonzero(moduli)) / moduli.numel() if moduli.numel() else 0.0
    nonfinite = moduli.numel() - int(torch.isfinite(dense).sum())
    largest = math.inf if nonfinite else float(moduli.max()) if moduli.numel() else 0.0
    return parts._replace(
        largest=min(largest, LARGEST) if largest < math.inf else largest, zeros=zeros, nonfinite=nonfinite
    )
