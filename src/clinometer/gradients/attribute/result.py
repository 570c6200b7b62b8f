"""Who pushed a weight: the terms of an attribution, by token, in text and for a machine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clinometer.gradients.attribute.tokens import Text
from clinometer.gradients.report.document import (
    BLANK,
    Document,
    Line,
    Span,
    code,
    dim,
    name,
    note,
    number,
    sentence,
)
from clinometer.gradients.report.formatting import cell_width, format_count, format_number, shorten
from clinometer.gradients.report.places import Where
from clinometer.gradients.report.result import Result
from clinometer.messages import say

_SHOWN = 10
_LISTED = 4
"""Of the strongest, so many a side are written out."""


@dataclass
class Contribution:
    """What one use of the tensor adds, position by position."""

    op: str
    where: Where | None
    terms: Tensor
    squared: Tensor | None
    """‖δ‖²‖x‖² of each position; None for a single entry, whose term is all there is."""
    precision: torch.dtype


class Push(NamedTuple):
    """One position and what it adds."""

    value: float
    share: float
    """|value| of the sum of all |values|."""
    position: tuple[int, ...]
    """(batch, position); as many numbers as the use has axes where it does not fit the tokens."""
    text: str
    use: int | None
    """Which use it belongs to, where it does not fit the tokens."""


class Attribution(Result):
    """The gradient of one weight, or of a part of a tensor, as a sum over positions."""

    def __init__(
        self,
        tensor: str,
        index: Any,
        *,
        single: bool,
        gradient: float,
        parts: list[Contribution],
        text: Text,
        unseen: list[tuple[str, Where | None]],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        exact_norms: bool,
    ) -> None:
        self.name = tensor
        self.index = index
        self.single = single
        """Whether it is one weight; otherwise terms are parts along the gradient's own direction."""
        self.gradient = gradient
        """autograd's value; of a part, its norm."""
        self.uses = parts
        self.unseen = list({(op, w.label if w else ""): (op, w) for op, w in unseen}.values())
        self._text = text
        self._shape = shape
        self._dtype = dtype
        self._grid = _grid(parts, text.shape)
        self._fits = [_fitted(part.terms, self._grid) for part in parts]
        self._stacked = stacked([tuple(p.terms.shape) for p in parts], text.shape)
        self._exact_norms = exact_norms or self._stacked

    @property
    def total(self) -> float:
        """The sum of all terms."""
        return math.fsum(float(part.terms.sum()) for part in self.uses)

    @property
    def remainder(self) -> float:
        """What the terms leave of autograd's value: rounding, or uses that were not seen."""
        return self.gradient - self.total

    @property
    def complete(self) -> bool:
        """Whether rounding explains the remainder."""
        return abs(self.remainder) <= self._rounding

    @property
    def matrix(self) -> Tensor | None:
        """The terms of each (batch, position), float64; None if no use has the tokens' shape."""
        if self._stacked:
            return torch.stack([part.terms for part in self.uses], -1)
        fitted = [terms for terms in self._fits if terms is not None]
        return torch.stack(fitted).sum(0) if fitted else None

    @property
    def norms(self) -> Tensor | None:
        """‖what a token adds to the gradient of the part‖ at each (batch, position); None for one weight.

        ‖δ‖·‖x‖ for one linear use; of several uses together it is exact for linear and embedding, and
        otherwise the sum of their norms, an upper bound (`norms_exact`).
        """
        if any(part.squared is None for part in self.uses):
            return None
        pairs = [(part.squared, fit) for part, fit in zip(self.uses, self._fits, strict=True)]
        squared = [_fitted(s, self._grid) for s, fit in pairs if s is not None and fit is not None]
        if self._stacked and self.uses and self.uses[0].squared is not None:
            return torch.stack([p.squared for p in self.uses if p.squared is not None], -1).sqrt()
        kept = [s for s in squared if s is not None]
        if not kept:
            return None
        if self._exact_norms:
            return torch.stack(kept).sum(0).clamp(min=0).sqrt()
        return torch.stack([s.clamp(min=0).sqrt() for s in kept]).sum(0)

    @property
    def norms_exact(self) -> bool:
        return self._exact_norms

    def top(self, k: int = _SHOWN) -> list[Push]:
        """The k strongest positions, strongest first."""
        cells = list(self._cells())
        if not cells:
            return []
        flat = torch.cat([values.reshape(-1) for values, _ in cells])
        weight = float(flat.abs().sum())
        order = flat.abs().argsort(descending=True, stable=True)[:k].tolist()
        pushes: list[Push] = []
        for at in order:
            start = 0
            for values, use in cells:
                if at < start + values.numel():
                    position = _unravel(at - start, tuple(values.shape))
                    value = float(values[position])
                    text = "" if use is not None else self._text_at(position)
                    if value:
                        pushes.append(Push(value, abs(value) / weight, position, text, use))
                    break
                start += values.numel()
        return pushes

    @property
    def positions(self) -> int:
        """How many terms there are."""
        return sum(values.numel() for values, _ in self._cells())

    def entries(self) -> Mapping[str, Any]:
        return {self.name: self}

    def facts(self) -> Mapping[str, Any]:
        matrix, norms = self.matrix, self.norms
        ids = self._text.ids
        return {
            "name": self.name,
            "index": list(self.index) if self.single else None if self.index is None else str(self.index),
            "shape": list(self._shape),
            "single": self.single,
            "gradient": self.gradient,
            "total": self.total,
            "remainder": self.remainder,
            "complete": self.complete,
            "matrix": matrix,
            "norms": norms,
            "norms_exact": self.norms_exact,
            "tokens": None if ids is None or matrix is None or ids.shape != matrix.shape else ids,
            "top": [push._asdict() for push in self.top()],
            "uses": [
                {
                    "op": part.op,
                    "where": part.where,
                    "shape": list(part.terms.shape),
                    "total": float(part.terms.sum()),
                    "terms": part.terms if fit is None and not self._stacked else None,
                }
                for part, fit in zip(self.uses, self._fits, strict=True)
            ],
            "unseen": [{"op": op, "where": where} for op, where in self.unseen],
        }

    def document(self, language: str | None = None) -> Document:
        values = {
            "place": name(self._place),
            "gradient": number(format_number(self.gradient, sign=self.single, place="")),
            "count": format_count(self.positions),
            "remainder": f"{self.remainder:.0e}".replace("-", "−", int(self.remainder < 0))
            if self.remainder
            else "0",
        }
        what = "entry" if self.single else "part"
        lines: Document = [Line(sentence(f"attribution.{what}", language, **values), hang=2)]
        strongest = self.top()
        for key, sign in (("raise", 1), ("lower", -1)):
            pushes = [p for p in strongest if p.value * sign > 0][:_LISTED]
            if pushes:
                label = sentence(f"attribution.{key if self.single else key + '_part'}", language)
                spans: list[Span | str] = [note("▲ ") if sign > 0 else note("▼ "), *label, "  "]
                for i, push in enumerate(pushes):
                    spans += [*([dim(" · ")] if i else []), _said(push)]
                width = cell_width("".join(s.text for s in label)) + 4
                lines.append(Line(spans, 2, width))
        if strongest and self.positions > len(strongest):
            share = f"{100 * sum(p.share for p in strongest):.0f} %"
            values = {"share": share, "count": len(strongest)}
            lines.append(Line(sentence("attribution.strongest", language, **values), 2))
        if not self.complete:
            left = number(format_number(self.remainder, sign=True, place=""))
            lines.append(Line((note("· "), *sentence("attribution.remainder", language, left=left)), 2, 2))
            if self.unseen:
                seen = [f"{op} {where.label}" if where else op for op, where in self.unseen]
                listed = shorten(seen, language=language)
                lines.append(Line(sentence("attribution.unseen", language, listed=listed), 4, 2))
        return lines

    @property
    def _place(self) -> str:
        if self.single:
            return self.name + (f"[{', '.join(map(str, self.index))}]" if self.index else "")
        if self.index is None:
            return f"{self.name} ({'×'.join(map(str, self._shape))})"
        parts = self.index if isinstance(self.index, tuple) else (self.index,)
        return f"{self.name}[{', '.join('…' if p is Ellipsis else _slice(p) for p in parts)}]"

    @property
    def _rounding(self) -> float:
        narrowest = max((torch.finfo(p.precision).eps for p in self.uses), default=0.0)
        own = torch.finfo(self._dtype).eps
        summed = torch.finfo(torch.float64).eps if own < 1e-12 and narrowest < 1e-12 else 1.2e-7
        size = sum(float(part.terms.abs().sum()) for part in self.uses)
        square = sum(float(part.terms.square().sum()) for part in self.uses)
        partial = max((abs(float(part.terms.sum())) for part in self.uses), default=0.0)
        largest = max(abs(self.gradient) if self.uses else 0.0, partial)
        sums = 16 * summed * math.sqrt(max(1, self.positions)) * size
        return sums + max(narrowest, own) * (2 * len(self.uses) * largest + 4 * math.sqrt(square))

    def _cells(self) -> Iterator[tuple[Tensor, int | None]]:
        matrix = self.matrix
        if matrix is not None:
            yield matrix, None
        if not self._stacked:
            for i, (part, fit) in enumerate(zip(self.uses, self._fits, strict=True)):
                if fit is None:
                    yield part.terms, i

    def _text_at(self, position: tuple[int, ...]) -> str:
        return self._text.at(position) if self._text.shape == self._grid else ""


class Attributions(Result):
    """Several attributions of one forward and backward: `result[name]` is one of them."""

    def __init__(self, found: dict[str, Attribution], canonical: Mapping[str, str]) -> None:
        self._found = found
        self._canonical = dict(canonical)

    def entries(self) -> Mapping[str, Attribution]:
        return self._found

    def other_names(self) -> Mapping[str, str]:
        return self._canonical

    def facts(self) -> Mapping[str, Any]:
        return {"attributions": [one.facts() for one in self._found.values()]}

    def document(self, language: str | None = None) -> Document:
        lines: Document = []
        for one in self._found.values():
            lines += [*([BLANK] if lines else []), *one.document(language)]
        return lines


def joined(parts: Sequence[Attribution], text: Text) -> Attribution:
    """One weight's attribution over a batch, from those over its micro-batches, in order.

    Each part's loss counts the whole batch's tokens, so that gradients and terms add up.
    """
    first = parts[0]
    uses = [
        Contribution(
            use.op, use.where, torch.cat([part.uses[i].terms for part in parts]), None, use.precision
        )
        for i, use in enumerate(first.uses)
    ]
    return Attribution(
        first.name,
        first.index,
        single=True,
        gradient=math.fsum(part.gradient for part in parts),
        parts=uses,
        text=text,
        unseen=[seen for part in parts for seen in part.unseen],
        shape=first._shape,
        dtype=first._dtype,
        exact_norms=True,
    )


def stacked(leads: list[tuple[int, ...]], tokens: tuple[int, ...] | None) -> bool:
    """Whether the uses are the steps of a loop over positions: a recurrent network's, one use a position."""
    if len(leads) < 2 or any(len(lead) != 1 for lead in leads) or len(set(leads)) != 1:
        return False
    return tokens is None or tokens == (leads[0][0], len(leads))


def _grid(parts: list[Contribution], tokens: tuple[int, ...] | None) -> tuple[int, ...] | None:
    leads = [tuple(part.terms.shape) for part in parts]
    if tokens is not None and (stacked(leads, tokens) or any(_fit(lead, tokens) for lead in leads)):
        return tokens
    if stacked(leads, None) and tokens is None:
        return leads[0][0], len(leads)
    return leads[0] if len(set(leads)) == 1 and leads[0] else None


def _fit(lead: tuple[int, ...], grid: tuple[int, ...]) -> str:
    if lead == grid:
        return "same"
    if lead == (math.prod(grid),):
        return "flat"
    if len(grid) == 2 and lead == grid[::-1]:
        return "turned"
    return "squeezed" if [n for n in lead if n > 1] == [n for n in grid if n > 1] else ""


def _fitted(terms: Tensor, grid: tuple[int, ...] | None) -> Tensor | None:
    fit = "" if grid is None else _fit(tuple(terms.shape), grid)
    if grid is None or not fit:
        return None
    return terms.T if fit == "turned" else terms.reshape(grid)


def _said(push: Push) -> Span:
    """One piece, so that no line breaks between a token, its place and its value."""
    read = push.text if push.text.startswith("#") or not push.text else f"“{push.text}”"
    use = "" if push.use is None else say("attribution.use", number=push.use + 1)
    place = ":".join(map(str, push.position))
    value = format_number(push.value, sign=True, place="")
    return code(" ".join(part for part in (read, use, place, value) if part))


def _slice(part: Any) -> str:
    if isinstance(part, slice):
        return ":".join("" if x is None else str(x) for x in (part.start, part.stop))
    return str(part)


def _unravel(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        flat, rest = divmod(flat, size)
        index.append(rest)
    return tuple(reversed(index))
