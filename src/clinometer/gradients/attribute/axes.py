"""The letters of a product's axes, as einsum writes them."""

from __future__ import annotations

from typing import NamedTuple

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Axes(NamedTuple):
    """The axes of y = Σ x · w, and those of y that are positions."""

    x: str
    w: str
    y: str
    lead: str


def matmul_axes(x_dim: int, w_dim: int, *, transposed: bool = False, first: bool = False) -> Axes | None:
    """Of x @ w; `transposed`: x @ wᵀ, a linear layer; `first`: w @ x. None for axes matmul does not take.

    Batch axes of w stand for experts or heads: they are positions too, where w has something of its own.
    """
    if not x_dim or not w_dim:
        return None
    batch = _LETTERS[2 : 2 + max(x_dim, w_dim) - 2] if max(x_dim, w_dim) > 2 else ""
    x_batch = batch[len(batch) - (x_dim - 2) :] if x_dim > 2 else ""
    w_batch = batch[len(batch) - (w_dim - 2) :] if w_dim > 2 else ""
    rows = "y" if x_dim > 1 else ""
    columns = "z" if w_dim > 1 else ""
    if first:  # w is (columns, summed), x is (summed, rows)
        x, w = x_batch + "s" + rows, w_batch + columns + "s"
        return Axes(x, w, batch + columns + rows, batch + rows)
    x = x_batch + rows + "s"
    w = w_batch + (columns + "s" if transposed else "s" + columns)
    return Axes(x, w, batch + rows + columns, batch + rows)


def einsum_axes(equation: str, dims: list[int], mine: int) -> Axes | None:
    """Of a two-operand einsum in which operand `mine` is the weight; None for repeated letters."""
    given, arrow, out = equation.replace(" ", "").partition("->")
    parts = given.split(",")
    if len(parts) != 2:
        return None
    free = iter(letter for letter in _LETTERS + _LETTERS.upper() if letter not in equation)
    missing = [dim - len(part.replace("...", "")) for part, dim in zip(parts, dims, strict=True)]
    dots = "".join(next(free) for _ in range(max(0, *missing)))
    spelled = [
        part.replace("...", dots[len(dots) - count :] if count else "")
        for part, count in zip(parts, missing, strict=True)
    ]
    if arrow:
        out = out.replace("...", dots)
    else:
        letters = "".join(spelled)
        once = sorted(a for a in set(letters) if letters.count(a) == 1 and a not in dots)
        out = dots + "".join(once)
    x, w = spelled[1 - mine], spelled[mine]
    if any(len(set(axes)) != len(axes) for axes in (x, w, out)):
        return None
    return Axes(x, w, out, "".join(a for a in out if a not in w or a in x))


def contracted_axes(equation: str, count: int, mine: int) -> tuple[str, Axes] | None:
    """Of an einsum of more than two: how the others are contracted first, and the axes of what is left.

    They are summed over the axes that neither the weight nor the result needs. None for dots, repeated
    letters of the weight, or a result that is not spelled out.
    """
    given, arrow, y = equation.replace(" ", "").partition("->")
    parts = given.split(",")
    if not arrow or "." in given or len(parts) != count or count < 3:
        return None
    w, others = parts[mine], [part for i, part in enumerate(parts) if i != mine]
    if any(len(set(axes)) != len(axes) for axes in (w, y)):
        return None
    x = "".join(a for a in dict.fromkeys("".join(others)) if a in w + y)
    return f"{','.join(others)}->{x}", Axes(x, w, y, "".join(a for a in y if a not in w or a in x))


def elementwise_axes(w_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> Axes | None:
    """Of w, broadcast, times or plus something of y's shape; the last axis of y holds features."""
    if len(w_shape) > len(y_shape) or len(y_shape) > len(_LETTERS):
        return None
    y = _LETTERS[: len(y_shape)]
    own = iter(_LETTERS.upper())
    w = "".join(
        axis if size == whole else next(own)
        for axis, size, whole in zip(
            y[len(y) - len(w_shape) :], w_shape, y_shape[len(y) - len(w_shape) :], strict=True
        )
    )
    return Axes(y, w, y, y[:-1])
