"""The pages of docs/en and docs/zh whose code runs, and running one.

`clinometer learn` runs a lesson with the same `PageSession`, so what the tests run is what a reader runs.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import torch

from clinometer.lessons.lesson_pages import Code, pieces
from clinometer.lessons.page_session import PageSession
from clinometer.messages import set_language

DOCS = Path(__file__).parents[2] / "docs"
WIDTH = 88
OWN_TESTS = {
    "causes.md": "tests/gradients/diagnose/test_diagnose_docs.py: each block stands for its cause",
    "run-file.md": "tests/record/test_docs.py: it reads a run that must be there first",
}
"""Pages whose code a test of their own runs, by name."""

TIMES = re.compile(r"(?<=\bin )[\d.,]+ (?:ms|s)\b|(?<=用时 )[\d.,]+ (?:毫秒|秒|ms|s)")
ROUNDING = (
    (re.compile(r"(?:largest error:|最大误差只有容差的)\s+(?P<number>[\d.e+−-]+)"), 1.0),
    (re.compile(r"(?:remainder|余项)\s+(?P<number>[\d.e+−-]+)"), 1e-12),
    (re.compile(r" %(?P<number> +\d+\.\d)$", re.M), 4.0),
)
"""Numbers that only rounding decides, and the largest that each may be.

A fraction of a tolerance; what shares leave of their sum; a step's units in the last place, at the end of a
table's line. They differ between processors, so a page shows `…` for them."""
NUMBER = re.compile(r"[+−-]?(?<![\w.])\d+(?:\.\d+)?(?:e[+−-]?\d+)?", re.A)
DECIMAL = re.compile(r"(?<![\w.])[+−-]?(\d+\.\d+(?:e[+−-]?\d+)?|\d+e[+−-]?\d+)(?![\w.]*\w)", re.A)


@dataclass
class Ran:
    """A block and what it printed."""

    code: Code
    printed: str
    """With `…` for what only rounding decides."""
    rounding: list[tuple[float, float]]
    """Those numbers, and how large each may be."""


def pages() -> list[Path]:
    """Every page that holds Python and has no test of its own."""
    found = []
    for language in ("en", "zh"):
        for path in sorted((DOCS / language).rglob("*.md")):
            if path.relative_to(
                DOCS / language
            ).as_posix() not in OWN_TESTS and "```python" in path.read_text(encoding="utf-8"):
                found.append(path)
    return found


def name_of(path: Path) -> str:
    return path.relative_to(DOCS).as_posix()


def run(path: Path, keep: dict | None = None) -> list[Ran]:
    """The page's blocks in order, in the page's language; `keep` takes the namespace they leave."""
    ran = []
    with _as_in_a_new_process(name_of(path)[:2]), PageSession() as session:
        for piece in pieces(path.read_text(encoding="utf-8")):
            if not isinstance(piece, Code) or not piece.runs:
                continue
            heard = io.StringIO()
            # Both streams in one, as a terminal shows them: alerts go to standard error.
            with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
                session.run(piece)
            ran.append(Ran(piece, *without_rounding(normalised(heard.getvalue(), session.folder))))
        if keep is not None:
            keep.update(session.locals)
    return ran


@contextlib.contextmanager
def _as_in_a_new_process(language: str) -> Iterator[None]:
    columns, dtype, state = os.environ.get("COLUMNS"), torch.get_default_dtype(), torch.get_rng_state()
    os.environ["COLUMNS"] = str(WIDTH)
    set_language(language)
    try:
        yield
    finally:
        set_language(None)
        torch.set_default_dtype(dtype)
        torch.set_rng_state(state)
        torch.set_grad_enabled(True)
        torch.autograd.set_detect_anomaly(False)
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def normalised(printed: str, folder: Path) -> str:
    """Without the temporary folder, and without spaces at the ends of lines."""
    printed = printed.replace(str(folder) + os.sep, "").replace("\\", "/" if os.sep == "\\" else "\\")
    return "".join(line.rstrip() + "\n" for line in printed.splitlines())


def without_rounding(printed: str) -> tuple[str, list[tuple[float, float]]]:
    """With `…` for each number of ROUNDING, and those numbers with their limits."""
    found = []
    for pattern, limit in ROUNDING:
        found += [(float(text.replace("−", "-")), limit) for text in pattern.findall(printed)]
        printed = pattern.sub(_left_out, printed)
    return printed, found


def _left_out(match: re.Match[str]) -> str:
    number = match["number"]
    return match[0].removesuffix(number) + "…".rjust(len(number) if number[0] == " " else 1)


def without_times(printed: str) -> str:
    """With `…` for how long something took, and without white space: a time's length moves line breaks."""
    return "".join(TIMES.sub("…", printed).split())


def same(shown: str, printed: str, units: int = 1) -> bool:
    """Equal but for how long something took, and for `units` in the last digit shown: a number may lie where
    rounding for the page goes up on one processor and down on another."""
    if TIMES.search(printed) or "…" in printed:
        shown, printed = without_times(shown), without_times(printed)
    if shown == printed:
        return True
    if NUMBER.sub("#", shown) != NUMBER.sub("#", printed):
        return False
    return all(
        _near(a, b, units) for a, b in zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    )


def _near(shown: str, printed: str, units: int) -> bool:
    if shown == printed:
        return True
    a, b = (Decimal(text.replace("−", "-")) for text in (shown, printed))
    exponent = a.as_tuple().exponent
    if isinstance(exponent, str) or exponent >= 0:  # a whole number is a count
        return False
    return abs(a - b) <= Decimal(units).scaleb(exponent)


def numbers(text: str) -> set[float]:
    """The decimals in a text, without their signs: 0.5, 1e-7, 3.2e-05."""
    return {float(match[1].replace("−", "-")) for match in DECIMAL.finditer(text)}
