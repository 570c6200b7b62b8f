"""A lesson in the terminal: prose, a block, its output, the next; the blocks really run."""

from __future__ import annotations

import re
import sys

from rich.console import Console
from rich.markdown import Markdown
from rich.rule import Rule
from rich.syntax import Syntax
from rich.text import Text

from clinometer.lessons.lesson_pages import Code, Lesson, pieces
from clinometer.lessons.page_session import PageSession
from clinometer.messages import say

COMMENT = re.compile(r"<!--.*?-->", re.S)
IMAGE = re.compile(r"!\[([^]]*)\]\([^)]*\)")
ONWARD = re.compile(r"^[^\n\[]{1,8}\[[^]]*\]\(\d+-[\w-]+\.md\)[.。]$", re.M)
"""The last line of a page, which leads to the next one: the terminal shows the command instead."""
LINK = re.compile(r"(?<!!)\[([^]]*)\]\((?!https?:)[^)]*\)")


def show(console: Console, lesson: Lesson, *, waits: bool) -> bool:
    """Show a lesson and run it; with `waits`, each block runs when the reader presses Enter.

    False if the reader left before the end.
    """
    with PageSession() as session:
        for piece in pieces(lesson.path.read_text(encoding="utf-8")):
            if not isinstance(piece, Code):
                console.print(Markdown(prose(piece.text), code_theme="ansi_dark", hyperlinks=False))
                console.print()
                continue
            name = say("learn.file", name=piece.file) if piece.is_file else piece.file if piece.runs else ""
            console.print(Rule(Text(name, style="dim"), align="left", style="dim"))
            code = piece.text.rstrip("\n")
            if console.is_terminal:
                coloured = Syntax(code, "python", theme="ansi_dark", background_color="default")
                shown = coloured.highlight(code)
                shown.rstrip()
            else:
                shown = Text(code)
            console.print(shown, soft_wrap=True)  # its lines as they are, for who copies them
            console.print(Rule(style="dim"))
            if piece.runs and waits and not piece.is_file and not goes_on(console):
                return False
            sys.stdout.flush()
            if piece.runs:
                session.run(piece)
            sys.stdout.flush()
            console.print()
    return True


def goes_on(console: Console) -> bool:
    """Wait for Enter; False for a q, and True where the input has ended."""
    try:
        return console.input(Text(say("learn.enter") + " ", style="dim")).strip().lower() != "q"
    except EOFError:
        console.print()
        return True


def prose(text: str) -> str:
    """Markdown without what a terminal cannot follow: comments, links between pages, figures."""
    text = IMAGE.sub(lambda found: f"*{say('learn.figure', text=' '.join(found[1].split()))}*", text)
    return LINK.sub(r"\1", ONWARD.sub("", COMMENT.sub("", text))).strip()
