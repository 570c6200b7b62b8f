"""Log2 histograms: how many entries have which exponent.

Bucket 0 counts exact zeros, bucket k ≥ 1 the entries with ⌊log₂|x|⌋ = k − 48; what is smaller than 2⁻⁴⁷ goes
in bucket 1, what is at least 2¹⁵, infinite or NaN in bucket 63. The exponent is read off the bits.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clinometer.vocabulary import BUCKETS, LOW_EXPONENT

_LOWEST = 127 + LOW_EXPONENT + 1
"""The largest biased exponent of float32 in bucket 1."""


class Rooms(Protocol):
    def room(self, name: str, size: int, dtype: torch.dtype) -> Tensor: ...


def count_zeros(values: Tensor, rooms: Rooms) -> int:
    """Exact zeros in a row of numbers on the host: through bools, faster than torch.count_nonzero."""
    alive = rooms.room("alive", values.numel(), torch.bool).copy_(values)
    return values.numel() - int(np.count_nonzero(alive.numpy()))


def _buckets(values: Tensor, out: Tensor, rooms: Rooms) -> None:
    """The bucket of each number, except that zeros are in the first of the others."""
    if values.dtype == torch.float32:
        bits = torch.bitwise_right_shift(
            values.view(torch.int32), 23, out=rooms.room("bits", values.numel(), torch.int32)
        )
        # A byte keeps the exponent and drops the sign; what is left to do is done on a quarter of the memory.
        out.copy_(bits).clamp_(_LOWEST, _LOWEST + BUCKETS - 2).sub_(_LOWEST - 1)
        return
    bits = torch.bitwise_right_shift(
        values.view(torch.int64), 52, out=rooms.room("bits", values.numel(), torch.int64)
    )
    out.copy_(bits.bitwise_and_(0x7FF).sub_(1023 + LOW_EXPONENT).clamp_(1, BUCKETS - 1))


def count_into(counts: np.ndarray, values: Tensor, rooms: Rooms) -> None:
    """Add the histogram of a row of float32 or float64 numbers on the host to `counts` [64]."""
    size = values.numel()
    if not size:
        return
    even = size + size % 2
    small = rooms.room("buckets", even, torch.uint8)
    _buckets(values, small[:size], rooms)
    if even != size:
        small[size] = 0
    # Two at a time: half as many increments, in a table of 64 × 256 that the cache holds.
    table = torch.bincount(small.view(torch.int16), minlength=BUCKETS * 256).view(BUCKETS, 256)
    table = table[:, :BUCKETS]
    found = (table.sum(0) + table.sum(1)).numpy()
    found[0] = 0  # the one that filled up
    if found[1]:  # a zero may be among them, or a number too small to have an exponent
        found[0] = count_zeros(values, rooms)
        found[1] -= found[0]
    counts += found
