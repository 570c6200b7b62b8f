"""Which function computes which statistic.

Most statistics come out of two passes, one over each gradient (with its first moment) and one over each
weight. Three modules implement them: statistics.py (a large tensor on the host), small_tensors.py (many small
ones at once) and device.py (on a GPU). They return their numbers in the order of the vocabulary.

A statistic may also have a computation of its own here, a function of one tensor: one more reading of memory,
and no other place to change. On a GPU it waits for the result.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from clinometer.vocabulary import MEASURED, Source

OF_GRADIENT: dict[str, Callable[[Tensor, Tensor | None], float]] = {}
"""By the statistic's name: a function of this rank's part of the gradient, and of the first moment if any."""
OF_WEIGHT: dict[str, Callable[[Tensor, Tensor], float]] = {}
"""By the statistic's name: a function of the weight after the step and before it, both flat."""

GRADIENT_PASS = [
    column
    for column, one in enumerate(MEASURED)
    if one.source is not Source.WEIGHT and one.name not in OF_GRADIENT
]
"""The columns that the pass over gradients fills, in its order."""
WEIGHT_PASS = [
    column for column, one in enumerate(MEASURED) if one.source is Source.WEIGHT and one.name not in OF_WEIGHT
]
"""The columns that the pass over weights fills, in its order."""
