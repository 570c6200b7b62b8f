"""The same eight numbers for small tensors, many of them together.

A call costs some microseconds, however little it has to do, and a model has more small tensors than large
ones. So they are copied beside each other, each from the beginning of a row of 1,024 entries on, into a place
that stays in a core's cache, and one call does for all what one did for each. The sum over a row is float32,
the sum over a tensor's rows float64: a tensor's numbers do not depend on its neighbours. What float32 cannot
hold is measured again by statistics.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from clinometer.monitoring.histograms import BUCKETS, LOW_EXPONENT
from clinometer.monitoring.statistics import (
    LARGEST,
    TRUSTED,
    TRUSTED_SQUARE,
    Scratch,
    measure_gradient,
)

ROW = 1024
_MOST = 1 << 16
"""Entries of a small tensor: beyond that the copy costs more than the calls."""
_TOGETHER = 1 << 17
"""Entries that are looked at together: 0.5 MiB each of gradients and moments."""
_TYPES = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_small(tensor: Tensor) -> bool:
    """Whether it may stand among the joined ones, whose copies are float32."""
    return (
        type(tensor) in _TYPES
        and 0 < tensor.numel() <= _MOST
        and tensor.dtype in _DTYPES
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
    )


class Layout:
    """Where each of some small tensors stands in rows of a buffer; what is left of a row is 0."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.sizes = np.array([math.prod(shape) for shape in shapes])
        lengths = -(-self.sizes // ROW)
        self._first = np.cumsum(lengths) - lengths
        self.entries = int(lengths.sum()) * ROW
        starts = self._first * ROW
        self.spans = [slice(a, a + n) for a, n in zip(starts.tolist(), self.sizes.tolist(), strict=True)]
        self._gaps = [
            slice(span.stop, following)
            for span, following in zip(self.spans, [*starts[1:].tolist(), self.entries], strict=True)
            if span.stop < following
        ]
        self._idle = self.entries - int(self.sizes.sum())
        self._owner = np.repeat(np.arange(len(shapes), dtype=np.int32) << 8, lengths)[:, None]
        # reduceat reduces from each edge to the next: the tensors, and the gaps between them.
        edges = np.stack([starts, starts + self.sizes], axis=1).reshape(-1)
        self._edges = edges[:-1] if edges[-1] == self.entries else edges

    def fill(self, place: Tensor, tensors: Sequence[Tensor | None]) -> np.ndarray:
        """The tensors, in float32, in this layout at the beginning of `place`; 0 for None."""
        values = place.numpy()
        for span, shape, tensor in zip(self.spans, self.shapes, tensors, strict=True):
            if tensor is None:
                values[span] = 0
            elif tensor.dtype is torch.float32:
                # numpy's copy, unlike torch's, wakes no thread.
                np.copyto(values[span].reshape(shape), tensor.detach().numpy())
            else:
                place[span].view(shape).copy_(tensor)
        for gap in self._gaps:
            values[gap] = 0
        return values[: self.entries]

    def products(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """[number of tensors] float64: ⟨a, b⟩ of each."""
        rows = _row_products(a.reshape(-1, ROW), b.reshape(-1, ROW))
        return np.add.reduceat(rows, self._first, dtype=np.float64)

    def largest(self, values: np.ndarray) -> np.ndarray:
        """[number of tensors]: max|x| of each, NaN where one is NaN."""
        high = np.maximum.reduceat(values, self._edges)[::2]
        low = np.minimum.reduceat(values, self._edges)[::2]
        return np.maximum(high, -low)

    def zeros(self, values: np.ndarray, place: np.ndarray) -> np.ndarray:
        """[number of tensors]: exact zeros of each; `place` is room for a bool an entry."""
        alive = np.not_equal(values, 0, out=place[: self.entries])
        if np.count_nonzero(alive) == self.entries - self._idle:
            return np.zeros(len(self.sizes), np.int64)
        return self.sizes - np.array([np.count_nonzero(alive[span]) for span in self.spans])

    def histograms(self, values: np.ndarray, place: np.ndarray) -> np.ndarray:
        """[number of tensors, 64] counts of each tensor's exponents, as in histograms.py."""
        codes = values.view(np.int32).reshape(-1, ROW) >> 23
        codes &= 0xFF
        codes += self._owner
        count = len(self.sizes)
        # torch's, unlike numpy's, does not copy its input to 64 bits first.
        raw = torch.bincount(torch.from_numpy(codes).view(-1), minlength=count << 8)
        raw = raw.numpy().reshape(count, 256)
        found = np.empty((count, BUCKETS), np.int64)
        found[:, 1:] = np.add.reduceat(raw, _EDGES, axis=1)
        found[:, 0] = self.zeros(values, place)
        # Numbers too small to have an exponent of their own; the gaps' zeros count for nobody.
        found[:, 1] = self.sizes - found.sum(axis=1) + found[:, 1]
        return found


_EDGES = np.array([1, *range(127 + LOW_EXPONENT + 2, 127 + LOW_EXPONENT + BUCKETS)])
"""The first biased exponent of float32 in each bucket but that of the zeros."""


def _row_products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):  # inf and NaN come, and are looked for
        if hasattr(np, "vecdot"):
            return np.vecdot(a, b)
        return np.einsum("ij,ij->i", a, b)  # numpy before 2.0


def _groups(sizes: Sequence[int]) -> list[slice]:
    """Neighbours that are looked at together."""
    groups, start, filled = [], 0, 0
    for number, size in enumerate(sizes):
        rows = -(-size // ROW) * ROW
        if filled + rows > _TOGETHER:
            groups.append(slice(start, number))
            start, filled = number, 0
        filled += rows
    return [*groups, slice(start, len(sizes))]


class Places:
    """Room for two groups of tensors, and a bool an entry."""

    def __init__(self) -> None:
        self.one = torch.empty(_TOGETHER, dtype=torch.float32, device="cpu")
        self.two = torch.empty(_TOGETHER, dtype=torch.float32, device="cpu")
        self.alive = np.empty(_TOGETHER, bool)


class Gradients:
    """Measures small gradients; keeps what it knows of their shapes from step to step."""

    def __init__(self) -> None:
        self.places = Places()
        self._shapes: list[tuple[int, ...]] = []
        self._groups: list[tuple[slice, Layout]] = []

    def measure(
        self,
        grads: list[Tensor],
        moments: list[Tensor | None],
        scratch: Scratch,
        counts: np.ndarray | None = None,
    ) -> np.ndarray:
        """[number of gradients, 6]: what `measure_gradient` says of each; a moment has its gradient's shape.

        Histograms are added to `counts` [number of gradients, 64].
        """
        shapes = [tuple(grad.shape) for grad in grads]
        if shapes != self._shapes:
            self._shapes = shapes
            parts = _groups([math.prod(shape) for shape in shapes])
            self._groups = [(part, Layout(shapes[part])) for part in parts]
        sizes = np.concatenate([layout.sizes for _, layout in self._groups])
        sums = np.empty((4, len(grads)))
        zeros = np.empty(len(grads))
        for part, layout in self._groups:
            g = layout.fill(self.places.one, grads[part])
            m = layout.fill(self.places.two, moments[part])
            sums[0, part], sums[1, part] = layout.largest(g), layout.products(g, g)
            sums[2, part], sums[3, part] = layout.products(g, m), layout.products(m, m)
            zeros[part] = layout.zeros(g, self.places.alive)
            if counts is not None:
                counts[part] += layout.histograms(g, self.places.alive)
        high, square, product, moment_square = sums
        has = np.array([moment is not None for moment in moments])
        found = np.zeros((len(grads), 6))
        with np.errstate(all="ignore"):
            found[:, 4] = np.clip(product / np.sqrt(square) / np.sqrt(moment_square), -1.0, 1.0)
            plain = ((high > TRUSTED[0]) & (high < TRUSTED[1])) | (high == 0)
            plain &= ~has | (
                (moment_square > TRUSTED_SQUARE[0])
                & (moment_square < TRUSTED_SQUARE[1])
                & (np.abs(product) < TRUSTED_SQUARE[1])
            )
        found[:, 0], found[:, 1], found[:, 2] = np.sqrt(square), high, zeros / sizes
        found[:, 5] = np.sqrt(moment_square)
        found[high == 0, 4] = np.nan
        found[~has, 4:] = np.nan
        for number in np.flatnonzero(~plain):
            found[number] = measure_gradient(grads[number], moments[number], scratch)
        return found


class Room:
    """Copies of small float32 weights as they were at the last look."""

    def __init__(self, weights: list[Tensor]) -> None:
        self._shapes = [tuple(weight.shape) for weight in weights]
        parts = _groups([weight.numel() for weight in weights])
        self._groups = [(part, Layout(self._shapes[part])) for part in parts]
        self._before = [torch.empty(layout.entries, dtype=torch.float32) for _, layout in self._groups]
        for (part, layout), before in zip(self._groups, self._before, strict=True):
            layout.fill(before, weights[part])
        self.whole = True
        """Each copy is still the one that stands here."""

    def __len__(self) -> int:
        return len(self._shapes)

    def copies(self) -> list[Tensor]:
        """The flat copy of each, a view."""
        return [
            before[span]
            for (_, layout), before in zip(self._groups, self._before, strict=True)
            for span in layout.spans
        ]

    def fits(self, weights: list[Tensor]) -> bool:
        """Whether they still have the shape and precision they came with."""
        return all(
            weight.shape == shape and weight.dtype is torch.float32 and weight.device.type == "cpu"
            for weight, shape in zip(weights, self._shapes, strict=True)
        )

    def measure(self, weights: list[Tensor], places: Places, counts: np.ndarray | None = None) -> np.ndarray:
        """[number of weights, 2]: ‖θ‖ and ‖θ − before‖; the copies are then those of now.

        The histograms of the weights and of their updates are added to `counts` [2, number of weights, 64].
        """
        squares = np.empty((len(weights), 2))
        for (part, layout), copy in zip(self._groups, self._before, strict=True):
            now, before = layout.fill(places.one, weights[part]), copy.numpy()
            with np.errstate(all="ignore"):
                difference = np.subtract(before, now, out=places.two.numpy()[: layout.entries])
            np.copyto(before, now)
            squares[part, 0] = _squares(layout, now)
            squares[part, 1] = _squares(layout, difference)
            if counts is not None:
                counts[0, part] += layout.histograms(now, places.alive)
                counts[1, part] += layout.histograms(difference, places.alive)
        with np.errstate(all="ignore"):
            return np.where(np.isfinite(squares), np.minimum(np.sqrt(squares), LARGEST), np.inf)


def _squares(layout: Layout, values: np.ndarray) -> np.ndarray:
    squares = layout.products(values, values)
    with np.errstate(invalid="ignore"):
        doubtful = ~((squares > TRUSTED_SQUARE[0]) & (squares < TRUSTED_SQUARE[1]))
    for number in np.flatnonzero(doubtful):
        wide = values[layout.spans[number]].astype(np.float64)
        squares[number] = float(np.dot(wide, wide))
    return squares
