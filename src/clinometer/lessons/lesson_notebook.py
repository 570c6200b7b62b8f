"""A lesson as a notebook: the JSON of Jupyter's format 4.5, with nothing to install.

Source: nbformat 5.10, "The Notebook file format". The tests hold it against nbformat's schema.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from clinometer.lessons.lesson_pages import Code, Lesson, images, pieces
from clinometer.lessons.terminal import COMMENT, LINK

IMAGE = re.compile(r"!\[([^]]*)\]\([^)]*?([\w.-]+\.svg)\)")
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def notebook(lesson: Lesson, language: str) -> str:
    """The notebook's text: prose and figures as Markdown cells, blocks as code cells without output."""
    chosen = f'import clinometer\n\nclinometer.set_language("{language}")\n'
    cells = [_code(chosen)]
    for piece in pieces(lesson.path.read_text(encoding="utf-8")):
        if not isinstance(piece, Code):
            cells.append(_prose(piece.text))
        elif not piece.runs:
            cells.append(_prose(f"```python\n{piece.text}```\n"))
        else:
            cells.append(_code(f"%%writefile {piece.file}\n{piece.text}" if piece.is_file else piece.text))
    cells[:2] = cells[1::-1]  # the title before the first cell of code
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    page = {"cells": cells, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(page, ensure_ascii=False, indent=1) + "\n"


def _code(text: str) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "execution_count": None,
        "metadata": {},
        "outputs": [],
        "source": text.strip("\n").splitlines(keepends=True),
    }


def _prose(text: str) -> dict[str, Any]:
    """A figure goes along as an attachment: the notebook is one file."""
    attachments: dict[str, Any] = {}

    def attach(found: re.Match[str]) -> str:
        file: Path = images() / found[2]
        attachments[file.name] = {"image/svg+xml": base64.b64encode(file.read_bytes()).decode("ascii")}
        return f"![{' '.join(found[1].split())}](attachment:{file.name})"

    text = LINK.sub(r"\1", IMAGE.sub(attach, COMMENT.sub("", text))).strip("\n")
    cell = {"cell_type": "markdown", "metadata": {}, "source": text.splitlines(keepends=True)}
    return cell | ({"attachments": attachments} if attachments else {})
