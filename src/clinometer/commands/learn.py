"""`clinometer learn`."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from clinometer.lessons import lesson_pages
from clinometer.messages import InputError, current_language, say
from clinometer.messages.folding import fold, tell


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
    lesson = lesson_pages.lesson(number, language)
    if notebook is not None:
        _write(lesson, language, notebook, overwrite)
        tell(console, say("learn.written", path=notebook))
        return 0
    from clinometer.lessons.terminal import show

    waits = not straight and console.is_terminal and sys.stdin.isatty()
    finished = show(console, lesson, waits=waits)
    if finished and number < len(lesson_pages.lessons(language)):
        tell(console, say("learn.next", number=number + 1))
    return 0


def _list(console: Console, language: str) -> None:
    table = Table.grid(padding=(0, 2))
    for lesson in lesson_pages.lessons(language):
        summary = fold(lesson.summary, console.width - 3) if console.is_terminal else lesson.summary
        table.add_row(str(lesson.number), f"[bold]{lesson.title}[/bold]\n{summary}")
    console.print(table, highlight=False)
    console.print()
    tell(console, say("learn.how"))


def _write(lesson: lesson_pages.Lesson, language: str, path: Path, overwrite: bool) -> None:
    from clinometer.lessons.lesson_notebook import notebook

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
