"""The statistics of a step: names, order, and everything that other rooms derive from them.

    a gradient    grad_norm ‖g‖₂ · grad_max max|g| · grad_zeros share of zeros · grad_nonfinite NaN and Inf
    a weight      weight_norm ‖θ‖₂ after the step · update_norm ‖θ_after − θ_before‖₂
    a moment      cosine ⟨g, m⟩/(‖g‖‖m‖) · moment_norm ‖m‖₂; m is the first moment before the step

From `REGISTRY` derive: the width and the order of a row (monitoring/measure), the sums and maxima over
ranks (measure/rank_sums.py), the columns and roll-ups of the run file (record/), exports and trackers
(record/out), and the labels, axes and choices of the page (view/). To add a statistic, add an entry here, its
computation in monitoring/measure/computations.py, and its three sentences in messages/*.toml.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class Source(Enum):
    """The tensor a measured statistic is computed from; without that tensor the statistic is NaN."""

    GRADIENT = "gradient"
    MOMENT = "moment"
    WEIGHT = "weight"


class OverRanks(Enum):
    """How the ranks' numbers of their parts become the number of the full tensor."""

    ROOT_OF_SQUARES = "root of the sum of squares"
    SHARE = "sum of (share · entries here), divided by all entries; a whole number of entries"
    SUM = "sum"
    MAXIMUM = "maximum"
    COSINE = "sum of the inner products, divided by the two norms in `norms`"


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """One number of one tensor in one step. It is measured (has a `source`) or derived (has `operands`)."""

    name: str
    source: Source | None = None
    over_ranks: OverRanks | None = None
    norms: tuple[str, ...] = ()
    """For OverRanks.COSINE: the names of the norms of the two vectors."""
    if_not_finite: float | None = None
    """The value where the gradient has NaN or Inf; None: the number as computed."""
    operands: tuple[str, ...] = ()
    """One name: that norm / √(number of entries), the root mean square. Two names: their ratio."""
    axis: str = ""
    """Curves with the same name share an axis of the page."""
    log: bool = True
    """Shown by order of magnitude."""

    @property
    def label_key(self) -> str:
        """The message with the label on an axis and in a caption."""
        return f"figure.statistic.{self.name}"

    @property
    def unit_key(self) -> str:
        """The message with the unit."""
        return f"figure.unit.{self.name}"

    @property
    def choice_key(self) -> str:
        """The message with the label in the page's choice of statistics."""
        return f"figure.choice.{self.name}"


def _measured(name: str, source: Source, over_ranks: OverRanks, axis: str, **options: object) -> Statistic:
    return Statistic(name=name, source=source, over_ranks=over_ranks, axis=axis, **options)  # pyright: ignore[reportArgumentType]


def _derived(name: str, operands: tuple[str, ...], axis: str) -> Statistic:
    return Statistic(name=name, operands=operands, axis=axis)


_G, _M, _W = Source.GRADIENT, Source.MOMENT, Source.WEIGHT
_ROOT = OverRanks.ROOT_OF_SQUARES

REGISTRY: tuple[Statistic, ...] = (
    _measured("grad_norm", _G, _ROOT, "grad", if_not_finite=math.inf),
    _derived("grad_rms", ("grad_norm",), "grad"),
    _measured("grad_max", _G, OverRanks.MAXIMUM, "grad", if_not_finite=math.inf),
    _measured("grad_zeros", _G, OverRanks.SHARE, "counts", log=False),
    _measured("grad_nonfinite", _G, OverRanks.SUM, "counts", log=False),
    _measured("weight_norm", _W, _ROOT, "weight"),
    _derived("weight_rms", ("weight_norm",), "weight"),
    _measured("update_norm", _W, _ROOT, "update"),
    _derived("update_rms", ("update_norm",), "update"),
    _derived("update_ratio", ("update_norm", "weight_norm"), "ratio"),
    _measured(
        "cosine",
        _M,
        OverRanks.COSINE,
        "cosine",
        norms=("grad_norm", "moment_norm"),
        if_not_finite=math.nan,
        log=False,
    ),
    _measured("moment_norm", _M, _ROOT, "moment"),
    _derived("moment_rms", ("moment_norm",), "moment"),
)
"""All statistics, in the order in which the page offers them."""

BY_NAME: dict[str, Statistic] = {one.name: one for one in REGISTRY}
MEASURED: tuple[Statistic, ...] = tuple(one for one in REGISTRY if one.source is not None)
STATISTICS: tuple[str, ...] = tuple(one.name for one in MEASURED)
"""The names of the measured statistics, in the order of the numbers in a row."""
DERIVED: dict[str, tuple[str, ...]] = {one.name: one.operands for one in REGISTRY if one.operands}
"""Each derived statistic, and the measured ones it is computed from when somebody reads it."""
COLUMN: dict[str, int] = {name: column for column, name in enumerate(STATISTICS)}

HISTOGRAM_KINDS = ("grad", "weight", "update")
BUCKETS = 64
"""Of a histogram: exact zeros, then one bucket for each power of two."""
LOW_EXPONENT = -48
"""Bucket k ≥ 1 counts the entries with ⌊log₂|x|⌋ = k + LOW_EXPONENT."""
