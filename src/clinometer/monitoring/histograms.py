"""Log2 histograms: how many entries have which exponent.

Bucket 0 counts exact zeros, bucket k ≥ 1 the entries with ⌊log₂|x|⌋ = k − 48; what is smaller than 2⁻⁴⁷ goes
in bucket 1, what is at least 2¹⁵, infinite or NaN in bucket 63. The exponent is read off the bits.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

BUCKETS = 64
LOW_EXPONENT = -48
_BIAS = {torch.float32: (23, 127, torch.int32, 0xFF), torch.float64: (52, 1023, torch.int64, 0x7FF)}


class Rooms(Protocol):
    def room(self, name: str, size: int, dtype: torch.dtype) -> Tensor: ...


def count_into(counts: np.ndarray, values: Tensor, rooms: Rooms) -> None:
    """Add the histogram of a row of float32 or float64 numbers on the host to `counts` [64]."""
    size = values.numel()
    if not size:
        return
    mantissa, bias, integer, mask = _BIAS[values.dtype]
    # The sign bit is shifted down with the exponent and masked away.
    bits = torch.bitwise_right_shift(
        values.view(integer), mantissa, out=rooms.room("bits", size, integer)
    ).bitwise_and_(mask)
    lowest = int(bits.min())
    bits.sub_(bias + LOW_EXPONENT).clamp_(1, BUCKETS - 1)
    even = size + size % 2
    small = rooms.room("buckets", even, torch.uint8)
    small[:size].copy_(bits)
    if even != size:
        small[size] = 0
    # Two at a time: half as many increments, in a table of 64 × 256 that the cache holds.
    table = torch.bincount(small.view(torch.int16), minlength=BUCKETS * 256).view(BUCKETS, 256)
    table = table[:, :BUCKETS]
    found = (table.sum(0) + table.sum(1)).numpy()
    found[0] = 0  # the one that filled up
    if lowest == 0:  # a zero or a subnormal number
        found[0] = size - int(torch.count_nonzero(values))
        found[1] -= found[0]
    counts += found
