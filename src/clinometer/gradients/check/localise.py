"""From a tensor whose gradient is wrong to the rows, columns and entries that are.

The error along a direction masked to a set S is Σ_{i∈S} (g*_i − g_i) v_i: a set without a wrong entry has
none. Halves are asked, then halves of halves, so one wrong entry among n costs O(log n) evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from clinometer.gradients.check.numerics.finite_differences import direction, reals, richardson, tolerance
from clinometer.gradients.check.numerics.perturbation import Probe

Range = tuple[int, int]
"""First and last index, both inside."""
_PIECES = 16
_MOST_ENTRIES = 16


@dataclass(frozen=True)
class EntryCheck:
    """One number of a tensor: its gradient twice."""

    index: tuple[int, ...]
    analytic: float | complex
    numeric: float | complex
    tolerance: float

    @property
    def error(self) -> float:
        return abs(self.numeric - self.analytic)

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class WrongRegion:
    """Where in a tensor the gradient is wrong."""

    shape: tuple[int, ...]
    rows: tuple[Range, ...] = ()
    """Ranges of the first dimension; each begins and ends with a wrong one."""
    columns: tuple[Range, ...] = ()
    """Ranges of the other dimensions together, counted as one."""
    entries: tuple[EntryCheck, ...] = ()
    """Wrong entries, when they are few enough to be asked one by one."""
    factor: float | None = None
    """The gradient is this many times what it should be, everywhere."""
    transposed: bool = False
    """The gradient is right after transposing it."""

    @property
    def all_rows(self) -> bool:
        return self.rows == ((0, self.shape[0] - 1),) if self.shape else True

    @property
    def all_columns(self) -> bool:
        return self.columns == ((0, math.prod(self.shape[1:]) - 1),)


@dataclass
class _Hunt:
    """Masked directions on one tensor at one step size."""

    probe: Probe
    name: str
    step: float
    least: float
    """Errors below this are what the numbers leave, not a finding."""
    generator: torch.Generator
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.shape = tuple(self.probe.tensors[self.name].shape)

    def wrong(self, rows: Range, columns: Range | None = None) -> bool:
        """Whether the block of these rows and columns holds an error; two draws, for one may cancel."""
        return any(self._error(rows, columns) for _ in range(2))

    def _error(self, rows: Range, columns: Range | None) -> bool:
        tensor = self.probe.tensors[self.name]
        v = torch.zeros_like(reals(tensor), dtype=torch.float64)
        v_rows = v.view(self.shape[0], -1, *v.shape[len(self.shape) :]) if self.shape else v
        drawn = direction(tensor, self.generator).view_as(v_rows)
        block = slice(rows[0], rows[1] + 1)
        if columns is None:
            v_rows[block] = drawn[block]
        else:
            side = slice(columns[0], columns[1] + 1)
            v_rows[block, side] = drawn[block, side]
        analytic, scale = self.probe.slope_by_gradient({self.name: v})
        error = richardson(self.probe.along({self.name: v}), self.step) - analytic
        return abs(error) > max(self.least, tolerance(scale, self.probe.magnitude, self.step))


def localise(probe: Probe, name: str, step: float, least: float, seed: int) -> WrongRegion:
    """The wrong rows, columns and, if they are few, entries of one tensor's gradient."""
    tensor = probe.tensors[name]
    shape = tuple(tensor.shape)
    generator = torch.Generator().manual_seed(seed)
    factor, transposed = pattern(probe, name, step, generator)
    hunt = _Hunt(probe, name, step, least, generator)
    rows: tuple[Range, ...] = ()
    columns: tuple[Range, ...] = ()
    if shape and factor is None and not transposed:
        rows = _wrong_ranges(shape[0], hunt.wrong)
        if len(shape) > 1 and rows:
            hull = (rows[0][0], rows[-1][1])
            columns = _wrong_ranges(math.prod(shape[1:]), lambda side: hunt.wrong(hull, side))
    entries: tuple[EntryCheck, ...] = ()
    indices = _indices(shape, rows, columns)
    if 0 < len(indices) <= _MOST_ENTRIES:
        checked = [check_entry(probe, name, index) for index in indices]
        entries = tuple(entry for entry in checked if not entry.passed)
    return WrongRegion(shape, rows, columns, entries, factor, transposed)


def largest_share(probe: Probe, name: str, step: float, generator: torch.Generator) -> float:
    """The largest error of any part, relative to that part's gradient or to a typical one of its size.

    Halves are followed down to an entry, always the one that is farther off: a single wrong entry among a
    million is small in the whole, and 1 at the end.
    """
    whole = probe.direction(name, generator)
    flat = whole.view(-1)
    grad = probe.gradients[name]
    typical = probe.slope_by_gradient({name: whole})[1] / math.sqrt(max(1, flat.numel()))
    if grad is None or not typical:
        return 1.0

    def share(low: int, high: int) -> float:
        v = torch.zeros_like(whole)
        v.view(-1)[low:high] = flat[low:high]
        analytic, scale = probe.slope_by_gradient({name: v})
        error = abs(richardson(probe.along({name: v}), step) - analytic)
        noise = tolerance(scale, probe.magnitude, step)
        return max(0.0, error - noise) / max(scale, typical * math.sqrt(high - low))

    low, high = 0, flat.numel()
    largest = share(low, high)
    while high - low > 1 and math.isfinite(largest):
        middle = (low + high) // 2
        left, right = share(low, middle), share(middle, high)
        low, high = (low, middle) if left >= right else (middle, high)
        largest = max(largest, left, right)
    return largest


def check_entry(probe: Probe, name: str, index: tuple[int, ...]) -> EntryCheck:
    """The single-entry difference: `∂L/∂θ[index]` by moving that one number."""
    tensor = probe.tensors[name]
    grad = probe.gradients[name]
    parts = []
    allowed = 0.0
    for part in range(2 if tensor.is_complex() else 1):
        v = torch.zeros_like(reals(tensor), dtype=torch.float64)
        at = (*index, part) if tensor.is_complex() else index
        size = max(abs(complex(tensor.detach()[index])), 1e-2)
        v[at] = size
        judged = probe.judge({name: v})
        parts.append(judged.numeric / size)
        allowed = max(allowed, judged.tolerance / size)
    analytic = 0.0 if grad is None else grad[index].item()
    numeric = complex(*parts) if len(parts) == 2 else parts[0]
    return EntryCheck(tuple(index), analytic, numeric, allowed)


def pattern(probe: Probe, name: str, step: float, generator: torch.Generator) -> tuple[float | None, bool]:
    """A constant factor, or a transposition, that explains the error along three directions."""
    grad = probe.gradients[name]
    if grad is None or not bool(grad.any()):
        return 0.0, False
    square = grad.ndim == 2 and grad.shape[0] == grad.shape[1] and grad.shape[0] > 1
    ratios, turned = [], square
    for _ in range(3):
        v = probe.direction(name, generator)
        analytic, scale = probe.slope_by_gradient({name: v})
        numeric = richardson(probe.along({name: v}), step)
        noise = tolerance(scale, probe.magnitude, step)
        if abs(numeric) > 100 * noise:
            ratios.append((analytic / numeric, noise / abs(numeric)))
        if square:
            other = float((reals(grad.mT).to(torch.float64) * v).sum())
            turned = turned and abs(numeric - other) <= 100 * noise
    if turned:
        return None, True
    if len(ratios) < 2:
        return None, False
    factor = ratios[0][0]
    # A factor is the same in every direction, as exactly as the numbers can tell, and not 1.
    change = abs(factor - 1)
    alike = all(
        abs(r - factor) <= min(2 * noise * max(1.0, abs(factor)), 0.1 * change) and noise <= change
        for r, noise in ratios
    )
    return (factor if alike else None), False


def _wrong_ranges(size: int, wrong: Callable[[Range], bool]) -> tuple[Range, ...]:
    """Ranges that hold every wrong index: halved while one half is right, then cut into pieces."""
    low, high = 0, size - 1
    while high > low:
        middle = (low + high) // 2
        left, right = wrong((low, middle)), wrong((middle + 1, high))
        if left == right:
            break
        low, high = (low, middle) if left else (middle + 1, high)
    if high == low:
        return ((low, high),)
    length = max(1, math.ceil((high - low + 1) / _PIECES))
    pieces = [(a, min(a + length - 1, high)) for a in range(low, high + 1, length)]
    found: list[Range] = []
    for piece in pieces:
        if wrong(piece):
            if found and found[-1][1] == piece[0] - 1:
                found[-1] = (found[-1][0], piece[1])
            else:
                found.append(piece)
    return tuple(_sharpen(part, length, wrong) for part in found)


def _sharpen(part: Range, length: int, wrong: Callable[[Range], bool]) -> Range:
    """The same range without the right indices at its two ends."""
    low, high = part
    a, b = low, min(low + length - 1, high)  # the first wrong one lies in here
    while a < b:
        middle = (a + b) // 2
        a, b = (a, middle) if wrong((low, middle)) else (middle + 1, b)
    c, d = max(high - length + 1, a), high
    while c < d:
        middle = (c + d + 1) // 2
        c, d = (middle, d) if wrong((middle, high)) else (c, middle - 1)
    return a, d


def _indices(
    shape: tuple[int, ...], rows: tuple[Range, ...], columns: tuple[Range, ...]
) -> list[tuple[int, ...]]:
    count = sum(b - a + 1 for a, b in rows) * (sum(b - a + 1 for a, b in columns) if columns else 1)
    if not count or count > _MOST_ENTRIES or (len(shape) > 1 and not columns):
        return []
    spots = [(row,) for a, b in rows for row in range(a, b + 1)]
    if not columns:
        return spots
    flat = torch.arange(math.prod(shape[1:])).view(shape[1:])
    inside = [
        tuple(int(i) for i in torch.nonzero(flat == column)[0])
        for a, b in columns
        for column in range(a, b + 1)
    ]
    return [(*row, *side) for row in spots for side in inside]
