"""Statistics that are computed when they are read: root mean squares and ratios of stored ones."""

from __future__ import annotations

import numpy as np

from clinometer.record.format.cells import Pieces


def derive(operands: list[Pieces], numel: np.ndarray) -> Pieces:
    """One operand: operand / √numel. Two: their ratio. x/0 gives inf; 0/0 gives NaN, no value."""
    top = operands[0]
    with np.errstate(all="ignore"):
        if len(operands) == 2:
            bottom = operands[1]
            mean = top.mean / bottom.mean
            low, high = (mean, mean) if not top.ends else (top.low / bottom.high, top.high / bottom.low)
        else:
            root = np.sqrt(numel.astype(np.float32))
            mean = top.mean / root
            low, high = (mean, mean) if not top.ends else (top.low / root, top.high / root)
    counts = None if top.counts is None else np.where(np.isnan(mean), 0, top.counts)
    return Pieces(top.start, top.rows, mean, low, high, counts, ends=top.ends)
