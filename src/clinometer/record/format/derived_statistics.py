"""Statistics that are computed when somebody reads them."""

from __future__ import annotations

import numpy as np

from clinometer.record.format.cells import Pieces
from clinometer.record.format.schema import STATISTICS

DERIVED = {
    "grad_rms": ("grad_norm",),
    "weight_rms": ("weight_norm",),
    "update_rms": ("update_norm",),
    "moment_rms": ("moment_norm",),
    "update_ratio": ("update_norm", "weight_norm"),
}
"""*_rms = *_norm / √numel; update_ratio = update_norm / weight_norm."""

STORED_FOR: dict[str, tuple[str, ...]] = {**{name: (name,) for name in STATISTICS}, **DERIVED}


def derive(statistic: str, parts: list[Pieces], numel: np.ndarray) -> Pieces:
    """The derived statistic of each piece. A division by zero gives inf; 0/0 gives NaN, nothing there."""
    top = parts[0]
    with np.errstate(all="ignore"):
        if statistic == "update_ratio":
            bottom = parts[1]
            mean = top.mean / bottom.mean
            low, high = (mean, mean) if not top.ends else (top.low / bottom.high, top.high / bottom.low)
        else:
            root = np.sqrt(numel.astype(np.float32))
            mean = top.mean / root
            low, high = (mean, mean) if not top.ends else (top.low / root, top.high / root)
    counts = None if top.counts is None else np.where(np.isnan(mean), 0, top.counts)
    return Pieces(top.start, top.rows, mean, low, high, counts, ends=top.ends)
