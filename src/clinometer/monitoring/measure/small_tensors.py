"""The same statistics for many small tensors at once.

A call costs some microseconds even for a tensor of few entries, and a model has more small tensors than
large ones. So small tensors are copied side by side into a buffer that fits a core's cache, each from the
beginning of a row of 1,024 entries, and one call serves all of them. The sum over a row is float32, the sum
over a tensor's rows float64: a tensor's numbers do not depend on its neighbours. statistics.py measures
again what exceeds float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from clinometer.monitoring.measure.statistics import (
    LARGEST,
    TRUSTED,
    TRUSTED_SQUARE,
    Scratch,
    measure_gradient,
)
from clinometer.vocabulary import BUCKETS, LOW_EXPONENT

ROW = 1024
_MOST = 1 << 16
"""Entries of a small tensor: beyond that the copy costs more than the calls."""
_TOGETHER = 1 << 18
"""Entries that are looked at together: 1 MiB each of gradients and moments."""
_REMEMBERED = 16
"""Layouts: one for each optimizer, and for each choice of tensors that have a gradient."""
_TYPES = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_small(tensor: Tensor) -> bool:
    """Whether the tensor is measured with others; their copies are float32."""
    return (
        type(tensor) in _TYPES
        and 0 < tensor.numel() <= _MOST
        and tensor.dtype in _DTYPES
        and tensor.layout is torch.strided
        and tensor.is_cpu
    )


class Places:
    """Room for a group's gradients and moments, or weights and updates, and for a bool an entry."""

    def __init__(self) -> None:
        self.one = torch.empty(_TOGETHER, dtype=torch.float32, device="cpu")
        self.two = torch.empty(_TOGETHER, dtype=torch.float32, device="cpu")
        self.alive = np.empty(_TOGETHER, bool)


class Group:
    """Some neighbours of a layout, which are looked at together: where they stand in a place."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], members: slice, first_row: int) -> None:
        self.members = members
        self._shapes = shapes[members]
        self.sizes = np.array([math.prod(shape) for shape in self._shapes])
        lengths = -(-self.sizes // ROW)
        self.entries = int(lengths.sum()) * ROW
        self._filled = int(self.sizes.sum())
        self.rows = slice(first_row, first_row + int(lengths.sum()))
        self._first = np.cumsum(lengths) - lengths
        starts = self._first * ROW
        self.spans = [slice(a, a + n) for a, n in zip(starts.tolist(), self.sizes.tolist(), strict=True)]
        self._owner = np.repeat(np.arange(len(self.sizes), dtype=np.int32) << 8, lengths)[:, None]
        # reduceat reduces from each edge to the next: the tensors, and the gaps between them.
        edges = np.stack([starts, starts + self.sizes], axis=1).reshape(-1)
        self._edges = edges[:-1] if edges[-1] == self.entries else edges
        self._views: dict[int, tuple[list[Tensor], list[np.ndarray], list[np.ndarray]]] = {}

    def fill(self, place: Tensor, tensors: Sequence[Tensor | None]) -> np.ndarray:
        """[rows, ROW]: the tensors in float32, each from the beginning of a row on; 0 for None and behind."""
        views, arrays, gaps = self._views_of(place)
        for view, array, tensor in zip(views, arrays, tensors, strict=True):
            if tensor is None:
                array.fill(0)
            elif tensor.dtype is torch.float32 and not tensor.is_neg():
                # numpy's copy, unlike torch's, wakes no thread.
                array[...] = (tensor.detach() if tensor.requires_grad else tensor).numpy()
            else:
                view.copy_(tensor)
        for gap in gaps:
            gap.fill(0)
        return place.numpy()[: self.entries].reshape(-1, ROW)

    def _views_of(self, place: Tensor) -> tuple[list[Tensor], list[np.ndarray], list[np.ndarray]]:
        found = self._views.get(id(place))
        if found is None:
            views = [place[span].view(shape) for span, shape in zip(self.spans, self._shapes, strict=True)]
            ends = [*(span.start for span in self.spans[1:]), self.entries]
            gaps = [
                place.numpy()[span.stop : end]
                for span, end in zip(self.spans, ends, strict=True)
                if span.stop < end
            ]
            found = self._views[id(place)] = views, [view.numpy() for view in views], gaps
        return found

    def sums(self, of_rows: np.ndarray) -> np.ndarray:
        """[…, number of members] float64 from […, rows]: each tensor's rows added up."""
        return np.add.reduceat(of_rows, self._first, axis=-1, dtype=np.float64)

    def largest(self, values: np.ndarray) -> np.ndarray:
        """[number of members]: max|x| of each, NaN where one is NaN."""
        row = values.reshape(-1)
        high, low = np.maximum.reduceat(row, self._edges), np.minimum.reduceat(row, self._edges)
        return np.maximum(high, -low)[::2]

    def zeros(self, values: np.ndarray, alive: np.ndarray) -> np.ndarray | int:
        """[number of members]: exact zeros of each; `alive` is room for a bool an entry."""
        row = np.not_equal(values.reshape(-1), 0, out=alive[: self.entries])
        if np.count_nonzero(row) == self._filled:
            return 0
        return self.sizes - np.array([np.count_nonzero(row[span]) for span in self.spans])

    def histograms(self, values: np.ndarray, alive: np.ndarray) -> np.ndarray:
        """[number of members, 64] counts of each tensor's exponents, as in histograms.py."""
        codes = values.view(np.int32) >> 23
        codes &= 0xFF
        codes += self._owner
        count = len(self.sizes)
        # torch's, unlike numpy's, does not copy its input to 64 bits first.
        raw = torch.bincount(torch.from_numpy(codes).view(-1), minlength=count << 8)
        found = np.empty((count, BUCKETS), np.int64)
        found[:, 1:] = np.add.reduceat(raw.numpy().reshape(count, 256), _EDGES, axis=1)
        found[:, 0] = self.zeros(values, alive)
        # What has no exponent of its own is a zero or smaller than any other; gaps are not counted.
        found[:, 1] += self.sizes - found.sum(axis=1)
        return found


class Layout:
    """Where each of some small tensors stands in rows of a buffer, and which are looked at together."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.sizes = np.array([math.prod(shape) for shape in shapes])
        lengths = -(-self.sizes // ROW)
        self.rows = int(lengths.sum())
        self.groups: list[Group] = []
        start = row = filled = 0
        for number, length in enumerate(lengths.tolist()):
            if (filled + length) * ROW > _TOGETHER:
                self.groups.append(Group(shapes, slice(start, number), row))
                start, row, filled = number, row + filled, 0
            filled += length
        self.groups.append(Group(shapes, slice(start, len(shapes)), row))


_EDGES = np.array([1, *range(127 + LOW_EXPONENT + 2, 127 + LOW_EXPONENT + BUCKETS)])
"""The first biased exponent of float32 in each bucket but that of the zeros."""


def _products(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """The sum of each row's products. The caller silences numpy: inf and NaN come, and are looked for."""
    if hasattr(np, "vecdot"):
        np.vecdot(a, b, out=out)
    else:
        np.einsum("ij,ij->i", a, b, out=out)  # numpy before 2.0


class Gradients:
    """Measures small gradients; keeps what it knows of their shapes from step to step."""

    def __init__(self) -> None:
        self.places = Places()
        self._layouts: dict[tuple[tuple[int, ...], ...], Layout] = {}

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
        layout = self._layout_of(tuple(tuple(grad.shape) for grad in grads))
        high, zeros = np.empty((2, len(grads)))
        sums = np.empty((3, len(grads)))
        with np.errstate(all="ignore"):
            for group in layout.groups:
                g = group.fill(self.places.one, grads[group.members])
                m = group.fill(self.places.two, moments[group.members])
                of_rows = np.empty((3, len(g)), np.float32)
                for (a, b), out in zip(((g, g), (g, m), (m, m)), of_rows, strict=True):
                    _products(a, b, out)
                sums[:, group.members] = group.sums(of_rows)
                high[group.members] = group.largest(g)
                zeros[group.members] = group.zeros(g, self.places.alive)
                if counts is not None:
                    counts[group.members] += group.histograms(g, self.places.alive)
            square, product, moment_square = sums
            norm, moment_norm = np.sqrt(square), np.sqrt(moment_square)
            cosine = np.clip(product / norm / moment_norm, -1.0, 1.0)
            has = np.array([moment is not None for moment in moments])
            plain = ((high > TRUSTED[0]) & (high < TRUSTED[1])) | (high == 0)
            plain &= ~has | (
                (moment_square > TRUSTED_SQUARE[0])
                & (moment_square < TRUSTED_SQUARE[1])
                & (np.abs(product) < TRUSTED_SQUARE[1])
            )
        cosine[(high == 0) | ~has] = moment_norm[~has] = np.nan
        found = np.stack(
            [norm, high, zeros / layout.sizes, np.zeros(len(grads)), cosine, moment_norm], axis=1
        )
        for number in np.flatnonzero(~plain):
            found[number] = measure_gradient(grads[number], moments[number], scratch)
        return found

    def _layout_of(self, shapes: tuple[tuple[int, ...], ...]) -> Layout:
        found = self._layouts.get(shapes)
        if found is None:
            if len(self._layouts) >= _REMEMBERED:
                self._layouts.clear()
            found = self._layouts[shapes] = Layout(shapes)
        return found


class Room:
    """Copies of small float32 weights as they were at the last look."""

    def __init__(self, weights: list[Tensor], places: Places, indices: Sequence[int] = ()) -> None:
        self.indices = list(indices)
        """The weights' places in the roster, in the order that `measure` expects them in."""
        self._layout = Layout([tuple(weight.shape) for weight in weights])
        self._places = places
        self._before = torch.empty(self._layout.rows * ROW, dtype=torch.float32, device="cpu")
        rows = self._before.numpy().reshape(-1, ROW)
        for group in self._layout.groups:
            rows[group.rows] = group.fill(places.one, weights[group.members])
        self.whole = True
        """Each copy is still the one that stands here."""

    def copies(self) -> list[Tensor]:
        """The flat copy of each, a view."""
        return [
            self._before[group.rows.start * ROW :][span]
            for group in self._layout.groups
            for span in group.spans
        ]

    def fits(self, weights: list[Tensor]) -> bool:
        """Whether they still have the shape and precision they came with."""
        return all(
            weight.shape == shape and weight.dtype is torch.float32 and weight.is_cpu
            for weight, shape in zip(weights, self._layout.shapes, strict=True)
        )

    def measure(self, weights: list[Tensor], counts: np.ndarray | None = None) -> np.ndarray:
        """[number of weights, 2]: ‖θ‖ and ‖θ − before‖; the copies are then those of now.

        The histograms of the weights and of their updates are added to `counts` [2, number of weights, 64].
        """
        layout, alive = self._layout, self._places.alive
        room = self._places.two.numpy()
        squares = np.empty((2, len(weights)))
        with np.errstate(all="ignore"):
            for group in layout.groups:
                now = group.fill(self._places.one, weights[group.members])
                before = self._before.numpy().reshape(-1, ROW)[group.rows]
                moved = np.subtract(before, now, out=room[: group.entries].reshape(-1, ROW))
                np.copyto(before, now)
                squares[:, group.members] = _squares(group, now, moved)
                if counts is not None:
                    counts[0, group.members] += group.histograms(now, alive)
                    counts[1, group.members] += group.histograms(moved, alive)
            return np.where(np.isfinite(squares), np.minimum(np.sqrt(squares), LARGEST), np.inf).T


def _squares(group: Group, *many: np.ndarray) -> np.ndarray:
    """[len(many), number of members]: each tensor's sum of squares, in float64 where float32 loses some."""
    of_rows = np.empty((len(many), len(many[0])), np.float32)
    for values, out in zip(many, of_rows, strict=True):
        _products(values, values, out)
    squares = group.sums(of_rows)
    plain = (squares > TRUSTED_SQUARE[0]) & (squares < TRUSTED_SQUARE[1])
    if not plain.all():
        for which, number in zip(*np.nonzero(~plain), strict=True):
            wide = many[which].reshape(-1)[group.spans[number]].astype(np.float64)
            squares[which, number] = float(np.dot(wide, wide))
    return squares
