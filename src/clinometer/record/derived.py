"""Statistics that are computed when somebody reads them."""

from __future__ import annotations

import numpy as np

from clinometer.record.cells import Pieces
from clinometer.record.schema import STATISTICS

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
    """The derived statistic of each piece, as float32. A division by zero gives inf, 0/0 NaN: nothing there."""
    top = parts[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        if statistic == "update_ratio":
            bottom = parts[1]
            mean, low, high = top.mean / bottom.mean, top.low / bottom.high, top.high / bottom.low
        else:
            root = np.sqrt(numel.astype(np.float32))
            mean, low, high = top.mean / root, top.low / root, top.high / root
    return Pieces(top.start, mean, low, high, np.where(np.isnan(mean), 0, top.weight))
