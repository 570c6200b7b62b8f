"""`clinometer learn`."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from clinometer.lessons import pages
from clinometer.messages import InputError, current_language, say


def learn_command(
    console: Console, number: int | None, straight: bool, notebook: Path | None, overwrite: bool
) -> int:
    """List the lessons, show and run one, or write it as a notebook; 0."""
    language = current_language()
    if number is None:
        if notebook is not None:
            raise InputError("learn.which", path=notebook)
        _list(console, language)
        return 0
    lesson = pages.lesson(number, language)
    if notebook is not None:
        _write(lesson, language, notebook, overwrite)
        console.print(say("learn.written", path=notebook), markup=False, highlight=False, soft_wrap=True)
        return 0
    from clinometer.lessons.terminal import show

    waits = not straight and console.is_terminal and sys.stdin.isatty()
    finished = show(console, lesson, waits=waits)
    if finished and number < len(pages.lessons(language)):
        console.print(say("learn.next", number=number + 1), markup=False, highlight=False)
    return 0


def _list(console: Console, language: str) -> None:
    table = Table.grid(padding=(0, 2))
    for lesson in pages.lessons(language):
        table.add_row(str(lesson.number), f"[bold]{lesson.title}[/bold]\n{lesson.summary}")
    console.print(table, highlight=False)
    console.print()
    console.print(say("learn.how"), markup=False, highlight=False, soft_wrap=True)


def _write(lesson: pages.Lesson, language: str, path: Path, overwrite: bool) -> None:
    from clinometer.lessons.notebook import notebook

    if path.suffix != ".ipynb":
        raise InputError("learn.not_a_notebook", path=path)
    text = notebook(lesson, language)
    try:
        with path.open("w" if overwrite else "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError:
        raise InputError("learn.exists", path=path) from None
    except OSError as error:
        raise InputError("learn.cannot_write", path=path, reason=error.strerror) from error
