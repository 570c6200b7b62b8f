"""The gradient noise scale, from micro-batches (McCandlish et al. 2018, appendix A.1).

With |g_b|² at a micro-batch of b and |g_B|² at the whole batch of B:

    G² = (B |g_B|² − b |g_b|²) / (B − b)          S = (|g_b|² − |g_B|²) / (1/b − 1/B)          noise = S / G²

Both are estimates without bias and with a large variance, so each is averaged over steps first. The first
micro-batch of every sixteenth step is measured; sizes are counted in micro-batches, and the result is too,
until the loop logs how many tokens a step has.
"""

from __future__ import annotations

EVERY = 16
_KEEP = 0.9
"""Of the averages, at each measurement: about the last ten count."""
_ENOUGH = 3


class NoiseScale:
    """S and G², averaged over the measured steps."""

    def __init__(self) -> None:
        self._signal = 0.0
        self._noise = 0.0
        self._weight = 0.0
        self._count = 0

    def add(self, first_square: float, whole_square: float, parts: int, ranks: int = 1) -> None:
        """|Σ of the first part|² and |Σ of all parts|², as they stand in `.grad`, for `parts` ≥ 2 equal ones.

        The first part is 1/parts of the batch, so its own gradient is `parts` times what stands there. Where
        the first part was one rank's own, and the whole is the mean over `ranks` of them, the batch has that
        many times as many parts.
        """
        small, large = parts * parts * first_square, whole_square
        parts *= ranks
        if parts < 2 or not (small < float("inf") and large < float("inf")):
            return
        signal = (parts * large - small) / (parts - 1)
        noise = (small - large) / (1 - 1 / parts)
        self._signal = _KEEP * self._signal + (1 - _KEEP) * signal
        self._noise = _KEEP * self._noise + (1 - _KEEP) * noise
        self._weight = _KEEP * self._weight + (1 - _KEEP)
        self._count += 1

    def value(self) -> float | None:
        """S/G² in micro-batches; None while there are too few measurements or the signal drowns."""
        if self._count < _ENOUGH or self._signal <= 0 or self._noise < 0:
            return None
        return self._noise / self._signal
