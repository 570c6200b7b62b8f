"""A page of documentation as pieces: prose, code that runs, and what it printed.

A ```python block runs; a ```text block right after it is what it printed. A block's code is in step1.py,
step2.py, … ```python title="train.py" is a file that later blocks import: it is written and not run, unless
what it printed follows.
```python no-run is neither, and an HTML comment before it gives the reason. Everything else is prose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from clinometer.messages import InputError

FENCE = re.compile(r"^(?P<ticks>`{3,})(?P<language>[\w-]*)[ \t]*(?P<rest>.*)$")
LESSON = re.compile(r"^(\d+)-[\w-]+\.md$")
TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Prose:
    """Markdown that is read and not run, code blocks of other kinds included."""

    text: str


@dataclass
class Code:
    """A block of Python, and the block of output below it."""

    text: str
    line: int
    """The line of the page, from 0, that holds its first line."""
    file: str
    runs: bool = True
    is_file: bool = False
    """Written for later blocks to import, and not run itself."""
    output: str | None = None
    """The output that the page shows; None if it shows none."""
    end: int = 0
    """The line of the page after its closing fence."""
    output_lines: tuple[int, int] | None = None
    """The lines of the page between the output's fences."""


Piece = Prose | Code


@dataclass(frozen=True)
class Lesson:
    """One lesson: its number, its title, the sentence below it, its file."""

    number: int
    title: str
    summary: str
    path: Path


def pieces(text: str) -> list[Piece]:
    """The page in order, prose and code in turn."""
    found: list[Piece] = []
    prose: list[str] = []
    lines = text.splitlines(keepends=True)
    at = count = 0

    def close() -> None:
        if "".join(prose).strip():
            found.append(Prose("".join(prose)))
        prose.clear()

    while at < len(lines):
        fence = FENCE.match(lines[at])
        if fence is None:
            prose.append(lines[at])
            at += 1
            continue
        start, ticks = at + 1, fence["ticks"]
        end = next((i for i in range(start, len(lines)) if lines[i].rstrip() == ticks), len(lines))
        body = "".join(lines[start:end])
        if fence["language"] == "python":
            count += 1
            close()
            title = TITLE.search(fence["rest"])
            runs = "no-run" not in fence["rest"].split()
            file = title[1] if title else f"step{count}.py"
            found.append(Code(body, start, file, runs, title is not None, end=end + 1))
        elif (
            fence["language"] == "text"
            and found
            and isinstance(last := found[-1], Code)
            and last.output is None
            and not "".join(prose).strip()
        ):
            prose.clear()
            last.output, last.output_lines = body, (start, end)
            last.is_file = False  # a script that runs under a name of its own
        else:
            prose.extend(lines[at : end + 1])
        at = end + 1
    close()
    return found


def folder(language: str) -> Path:
    """The lessons of a language, or the English ones: in the package, or, of a checkout, in its docs."""
    packed = Path(__file__).parent / language
    found = packed if packed.is_dir() else Path(__file__).parents[3] / "docs" / language / "lessons"
    return found if found.is_dir() or language == "en" else folder("en")


def images() -> Path:
    """Where the lessons' figures are."""
    packed = Path(__file__).parent / "images"
    return packed if packed.is_dir() else Path(__file__).parents[3] / "docs" / "images" / "lessons"


@cache
def lessons(language: str) -> tuple[Lesson, ...]:
    """All lessons of a language, in order; each page begins with a title and a paragraph that sums it up."""
    found = []
    for path in folder(language).glob("*.md"):
        named = LESSON.match(path.name)
        if named is None:
            continue
        head = path.read_text(encoding="utf-8").split("\n\n", 2)
        title = head[0].removeprefix("# ").partition(". ")[2].strip() or head[0].removeprefix("# ").strip()
        found.append(Lesson(int(named[1]), title, plain(" ".join(head[1].split())), path))
    return tuple(sorted(found, key=lambda lesson: lesson.number))


def lesson(number: int, language: str) -> Lesson:
    """Raises InputError where there is no lesson of that number."""
    known = lessons(language)
    for one in known:
        if one.number == number:
            return one
    raise InputError("learn.unknown", number=number, most=len(known))


def plain(text: str) -> str:
    """A sentence without Markdown's marks."""
    return re.sub(r"[`*]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text))
