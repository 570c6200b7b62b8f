"""The same eight numbers for small tensors, all of them together.

A call costs some microseconds, however little it has to do, and a model has more small tensors than large
ones. So they are copied beside each other, each from the beginning of a row of 512 entries on, and one call
does for all what one did for each. The sum over a row is float32, the sum over a tensor's rows float64: a
tensor's numbers do not depend on its neighbours. What float32 cannot hold is measured again by statistics.py.
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

ROW = 512
_MOST = 1 << 16
"""Entries of a small tensor: beyond that the copy costs more than the calls."""
_TYPES = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_foreach_copy_ = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]


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
    """Where each of some small tensors stands in a buffer of `rows` × 512; what is left of a row is 0."""

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        self.sizes = np.array([math.prod(shape) for shape in self.shapes])
        lengths = -(-self.sizes // ROW)
        self.first = np.cumsum(lengths) - lengths
        self.rows = int(lengths.sum())
        self.starts = self.first * ROW
        self.owner = np.repeat(np.arange(len(self.sizes), dtype=np.int32), lengths)[:, None]
        # reduceat reduces from each edge to the next: the tensors, and the gaps between them.
        edges = np.stack([self.starts, self.starts + self.sizes], axis=1).reshape(-1)
        self._edges = edges[:-1] if edges[-1] == self.rows * ROW else edges

    def buffer(self) -> tuple[Tensor, list[Tensor]]:
        """A new one, and a view of it in each tensor's shape."""
        room = torch.zeros(self.rows * ROW, dtype=torch.float32, device="cpu")
        return room, [self.of(room, i).view(shape) for i, shape in enumerate(self.shapes)]

    def of(self, room: Tensor, number: int) -> Tensor:
        start = int(self.starts[number])
        return room[start : start + int(self.sizes[number])]

    def products(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """[number of tensors] float64: ⟨a, b⟩ of each."""
        rows = _row_products(a.reshape(-1, ROW), b.reshape(-1, ROW))
        return np.add.reduceat(rows, self.first, dtype=np.float64)

    def reduce(self, how: np.ufunc, values: np.ndarray) -> np.ndarray:
        return how.reduceat(values, self._edges)[::2]

    def zeros(self, values: np.ndarray, number: int) -> int:
        start, size = int(self.starts[number]), int(self.sizes[number])
        return size - int(np.count_nonzero(values[start : start + size]))

    def histograms(self, values: np.ndarray) -> np.ndarray:
        """[number of tensors, 64] counts of each tensor's exponents, as in histograms.py."""
        codes = values.view(np.int32).reshape(-1, ROW) >> 23
        codes &= 0xFF
        codes += self.owner << 8
        count = len(self.sizes)
        # torch's, unlike numpy's, does not copy its input to 64 bits first.
        raw = torch.bincount(torch.from_numpy(codes).view(-1), minlength=count << 8)
        raw = raw.numpy().reshape(count, 256)
        found = np.zeros((count, BUCKETS), np.int64)
        for bucket, span in _SPANS:
            found[:, bucket] = raw[:, span].sum(axis=1)
        none = raw[:, 0] - (np.diff(self.starts, append=self.rows * ROW) - self.sizes)
        for number in np.flatnonzero(none):  # zeros, or numbers too small to have an exponent of their own
            found[number, 0] = self.zeros(values, int(number))
            found[number, 1] += none[number] - found[number, 0]
        return found


def _spans() -> list[tuple[int, slice]]:
    """For each bucket but that of the zeros, the biased exponents of float32 that belong to it."""
    bias = 127 + LOW_EXPONENT
    middle = [(bucket, slice(bias + bucket, bias + bucket + 1)) for bucket in range(2, BUCKETS - 1)]
    return [(1, slice(1, bias + 2)), *middle, (BUCKETS - 1, slice(bias + BUCKETS - 1, 256))]


_SPANS = _spans()


def _row_products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):  # inf and NaN come, and are looked for
        if hasattr(np, "vecdot"):
            return np.vecdot(a, b)
        return np.einsum("ij,ij->i", a, b)  # numpy before 2.0


class Gradients:
    """Measures small gradients; keeps the buffers from step to step."""

    def __init__(self) -> None:
        self._layout = Layout([(1,)])
        self._grads, self._moments = self._layout.buffer(), self._layout.buffer()
        self._moduli = np.empty(0, np.float32)

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
        self._lay_out([tuple(grad.shape) for grad in grads])
        layout, (room, views), (other, places) = self._layout, self._grads, self._moments
        has = np.array([moment is not None for moment in moments])
        _foreach_copy_(views, grads)
        if has.any():
            pairs = [(p, m) for p, m in zip(places, moments, strict=True) if m is not None]
            _foreach_copy_([place for place, _ in pairs], [moment for _, moment in pairs])
        g, m = room.numpy(), other.numpy()
        moduli = np.abs(g, out=self._moduli)
        high, low = layout.reduce(np.maximum, moduli), layout.reduce(np.minimum, moduli)
        square = layout.products(g, g)
        product, moment_square = layout.products(g, m), layout.products(m, m)
        with np.errstate(all="ignore"):
            cosine = np.clip(product / np.sqrt(square) / np.sqrt(moment_square), -1.0, 1.0)
        found = np.zeros((len(grads), 6))
        found[:, 0], found[:, 1] = np.sqrt(square), high
        found[:, 4], found[:, 5] = cosine, np.sqrt(moment_square)
        found[high == 0, 4] = np.nan
        found[~has, 4:] = np.nan
        for number in np.flatnonzero(~(low > 0)):
            found[number, 2] = layout.zeros(g, int(number)) / layout.sizes[number]
        plain = ((high > TRUSTED[0]) & (high < TRUSTED[1])) | (high == 0)
        with np.errstate(invalid="ignore"):
            plain &= ~has | (
                (moment_square > TRUSTED_SQUARE[0])
                & (moment_square < TRUSTED_SQUARE[1])
                & (np.abs(product) < TRUSTED_SQUARE[1])
            )
        for number in np.flatnonzero(~plain):
            found[number] = measure_gradient(grads[number], moments[number], scratch)
        if counts is not None:
            counts += layout.histograms(g)
        return found

    def _lay_out(self, shapes: list[tuple[int, ...]]) -> None:
        if shapes != self._layout.shapes:
            self._layout = Layout(shapes)
            self._grads, self._moments = self._layout.buffer(), self._layout.buffer()
            self._moduli = np.empty(self._layout.rows * ROW, np.float32)


class Room:
    """Copies of small float32 weights as they were at the last look, and place for those of now."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.layout = Layout([tuple(weight.shape) for weight in weights])
        self._before, self._now = self.layout.buffer(), self.layout.buffer()
        _foreach_copy_(self._before[1], weights)
        self.whole = True
        """Each copy is still the one that stands here."""

    def __len__(self) -> int:
        return len(self.layout.sizes)

    def copies(self) -> list[Tensor]:
        """The flat copy of each."""
        return [view.view(-1) for view in self._before[1]]

    def fits(self, weights: list[Tensor]) -> bool:
        """Whether they still have the shape and precision they came with."""
        return all(
            weight.shape == view.shape and weight.dtype is torch.float32 and weight.device.type == "cpu"
            for weight, view in zip(weights, self._now[1], strict=True)
        )

    def measure(
        self, weights: list[Tensor], counts: tuple[np.ndarray, np.ndarray] | None = None
    ) -> np.ndarray:
        """[number of weights, 2]: ‖θ‖ and ‖θ − before‖; `copies()` are then others, those of now.

        With `counts`, two of [number of weights, 64], the histograms of the weights and of their updates.
        """
        _foreach_copy_(self._now[1], weights)
        now, before = self._now[0].numpy(), self._before[0].numpy()
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.subtract(before, now, out=before)  # overwritten at the next look anyway
        found = np.stack([self._squares(now), self._squares(difference)], axis=1)
        with np.errstate(invalid="ignore"):
            norms = np.sqrt(found)
        norms = np.where(np.isfinite(found), np.minimum(norms, LARGEST), np.inf)
        if counts is not None:
            counts[0][:] += self.layout.histograms(now)
            counts[1][:] += self.layout.histograms(difference)
        self._before, self._now = self._now, self._before
        return norms

    def _squares(self, values: np.ndarray) -> np.ndarray:
        squares = self.layout.products(values, values)
        with np.errstate(invalid="ignore"):
            doubtful = ~((squares > TRUSTED_SQUARE[0]) & (squares < TRUSTED_SQUARE[1]))
        for number in np.flatnonzero(doubtful):
            start, size = int(self.layout.starts[number]), int(self.layout.sizes[number])
            wide = values[start : start + size].astype(np.float64)
            squares[number] = float(np.dot(wide, wide))
        return squares
