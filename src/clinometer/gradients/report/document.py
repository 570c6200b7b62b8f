"""One description of a result, and its three forms: text, a rich console's, HTML.

    document = [Line((fault("✗ "), *sentence("gradients.…", language, name=name("w"))), hang=2)]

A span's role says what it is; how that looks is decided here, once for all results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from string import Formatter
from typing import Any, Literal, NamedTuple

from clinometer.gradients.report.formatting import cell_width, is_wide
from clinometer.messages import current_language, one_or_many, sentences

Role = Literal["", "fault", "note", "ok", "code", "number", "name", "dim", "strong"]

RICH: dict[str, str] = {
    "fault": "bold red",
    "note": "blue",
    "ok": "bold green",
    "code": "cyan",
    "number": "bold",
    "name": "magenta",
    "dim": "dim",
    "strong": "bold",
}
# Each colour reads on white and on near-black (a test computes the contrast), for a notebook's theme
# cannot be asked.
HTML: dict[str, str] = {
    "fault": "color:#e0343c;font-weight:bold",
    "note": "color:#2f7bd0",
    "ok": "color:#1a8a4a;font-weight:bold",
    "code": "color:#0b8494",
    "number": "font-weight:bold",
    "name": "color:#a857c9",
    "dim": "opacity:0.7",
    "strong": "font-weight:bold",
}


class Span(NamedTuple):
    """Some text and what it is."""

    text: str
    role: Role = ""


Spans = Sequence[Span | str]


@dataclass(frozen=True)
class Line:
    """A paragraph; when it is too long, what follows is indented by `hang` more."""

    spans: Spans = ()
    indent: int = 0
    hang: int = 0


@dataclass(frozen=True)
class Table:
    """Rows with their columns aligned; `align` has "l" or "r" for each column, the last may wrap."""

    rows: Sequence[Sequence[Span | str | Spans]]
    align: str = ""
    indent: int = 0
    gap: int = 2


Document = list[Line | Table]
NBSP = "\u00a0"
"""Keeps what stands around it on one line; in text it is shown as a space."""
BLANK = Line()


def fault(text: str) -> Span:
    return Span(text, "fault")


def note(text: str) -> Span:
    return Span(text, "note")


def ok(text: str) -> Span:
    return Span(text, "ok")


def code(text: str) -> Span:
    """The user's own line; kept whole where it fits."""
    return Span(text, "code")


def number(text: str) -> Span:
    return Span(text, "number")


def name(text: str) -> Span:
    return Span(text, "name")


def dim(text: str) -> Span:
    return Span(text, "dim")


def sentence(key: str, language: str | None = None, /, **values: Any) -> tuple[Span, ...]:
    """`say(key, …)` as spans: a value that is a Span keeps its role."""
    spans = []
    plain = {name: value.text if isinstance(value, Span) else value for name, value in values.items()}
    for literal, place, spec, conversion in Formatter().parse(sentences(language or current_language())[key]):
        if literal:
            spans.append(Span(literal))
        if place is not None and (chosen := one_or_many(place, plain)) is not None:
            spans.append(Span(chosen))
        elif place is not None:
            value = values[place]
            if not isinstance(value, Span):
                bare = "{" + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"
                value = Span(bare.format(value))
            spans.append(value)
    return tuple(spans)


def to_text(document: Iterable[Line | Table], width: int = 100) -> str:
    """Plain text, no line wider than `width` columns where a break is possible."""
    lines = ("".join(span.text for span in line) for line in lay_out(document, width))
    return "\n".join(line.rstrip() for line in lines)


def to_rich(document: Iterable[Line | Table], width: int = 100) -> Iterator[Any]:
    """One rich Text a line."""
    from rich.text import Text

    for line in lay_out(document, width):
        parts = [(span.text, RICH.get(span.role, "")) for span in line]
        yield Text.assemble(*parts, no_wrap=True, overflow="ignore")


def to_html(document: Iterable[Line | Table]) -> str:
    """One self-contained element: escaped, no script, no style sheet, nothing loaded."""
    body = []
    for block in document:
        if isinstance(block, Line):
            style = f"padding-left:{block.indent + block.hang}ch;text-indent:-{block.hang}ch;min-height:1em"
            body.append(f'<div style="{style}">{_html(block.spans)}</div>')
            continue
        rows = "".join(
            "<tr>"
            + "".join(_td(cell, side) for cell, side in zip(row, _sides(block), strict=False))
            + "</tr>"
            for row in block.rows
        )
        body.append(f'<table style="margin-left:{block.indent}ch;border-collapse:collapse">{rows}</table>')
    style = "font-family:monospace;white-space:pre-wrap;color:inherit;background:transparent"
    return f'<div class="clinometer" style="{style}">{"".join(body)}</div>'


def lay_out(document: Iterable[Line | Table], width: int) -> Iterator[list[Span]]:
    """The document as lines of spans that fit `width` columns."""
    for block in document:
        if isinstance(block, Line):
            yield from _wrap(block.spans, width, block.indent, block.hang)
        else:
            yield from _lay_out_table(block, width)


def _lay_out_table(table: Table, width: int) -> Iterator[list[Span]]:
    rows = [[_spans(cell) for cell in row] for row in table.rows]
    sides = _sides(table)
    widths = [max((_width(row[c]) for row in rows if c < len(row)), default=0) for c in range(len(sides))]
    for row in rows:
        line = [Span(" " * table.indent)]
        for column, cell in enumerate(row):
            pad = Span(" " * (widths[column] - _width(cell)))
            if column == len(row) - 1 and sides[column] == "l":
                start = sum(cell_width(span.text) for span in line)
                first, *more = _wrap(cell, max(width, start + 20) - start, 0, 0)
                yield line + first
                yield from ([Span(" " * start), *rest] for rest in more)
            else:
                gap = Span(" " * table.gap if column < len(row) - 1 else "")
                line += [pad, *cell, gap] if sides[column] == "r" else [*cell, pad, gap]
                if column == len(row) - 1:
                    yield line
        if not row:
            yield []


def _wrap(spans: Spans, width: int, indent: int, hang: int) -> Iterator[list[Span]]:
    start = indent
    line: list[Span] = []
    used, waiting = start, Span("")
    for unit in _units(_spans(spans), width - indent - hang):
        if all(_gap(character) for character in unit[0].text):
            waiting = Span(waiting.text + unit[0].text, unit[0].role)
            continue
        size = _width(unit)
        if line and used + len(waiting.text) + size > width:
            yield [Span(" " * start), *line]
            start = indent + hang
            line, used, waiting = [], start, Span("")
        shown = [s if s.role == "code" else Span(s.text.replace(NBSP, " "), s.role) for s in unit]
        line += [waiting, *shown] if waiting.text else shown
        used += len(waiting.text) + size
        waiting = Span("")
    yield [Span(" " * start), *line]


_NEVER_FIRST = "，。；：、！？）》”’」』】…%·"
_NEVER_LAST = "（《“‘「『【"


def _units(spans: list[Span], room: int) -> Iterator[list[Span]]:
    """Pieces that stay together: words, runs of spaces, single wide characters with their punctuation."""
    unit: list[Span] = []
    before = ""
    for span in spans:
        whole = span.role == "code" and cell_width(span.text) <= room and not span.text.isspace()
        for piece in [span.text] if whole else span.text:
            if unit and _may_break(before, piece[0]):
                yield unit
                unit = []
            if unit and unit[-1].role == span.role:
                unit[-1] = Span(unit[-1].text + piece, span.role)
            else:
                unit.append(Span(piece, span.role))
            before = piece[-1]
    if unit:
        yield unit


def _may_break(before: str, after: str) -> bool:
    if _gap(before) or _gap(after):
        return _gap(before) != _gap(after)
    if after in _NEVER_FIRST or before in _NEVER_LAST:
        return False
    return is_wide(before) or is_wide(after)


def _gap(character: str) -> bool:
    return character.isspace() and character != NBSP


def _spans(given: Span | str | Spans) -> list[Span]:
    if isinstance(given, Span):
        return [given] if given.text else []
    if isinstance(given, str):
        return [Span(given)] if given else []
    return [s for part in given for s in _spans(part)]


def _width(spans: Iterable[Span]) -> int:
    return sum(cell_width(span.text) for span in spans)


def _sides(table: Table) -> str:
    columns = max((len(row) for row in table.rows), default=0)
    return table.align.ljust(columns, "l")[:columns]


def _html(spans: Span | str | Spans) -> str:
    return "".join(
        f'<span style="{HTML[span.role]}">{escape(span.text)}</span>' if span.role else escape(span.text)
        for span in _spans(spans)
    )


def _td(cell: Span | str | Spans, side: str) -> str:
    align = "right" if side == "r" else "left"
    return f'<td style="text-align:{align};padding:0 2ch 0 0;vertical-align:top">{_html(cell)}</td>'
