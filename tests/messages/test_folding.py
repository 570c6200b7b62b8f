import io
import itertools

import pytest
from rich.console import Console

from clinometer.messages.folding import _columns, fold, tell

MIXED = (
    "empty.txt 是空的；模型要有文本才能学习（见 docs/zh），"
    "请给一个有内容的文件：clinometer train --corpus FILE。"
)


def test_a_word_is_never_broken():
    text = "empty.txt is empty; a model needs text to learn from. Give a file with text in it."
    assert fold(text, 40).split() == text.split()
    assert max(map(len, fold(text, 40).split("\n"))) <= 40


@pytest.mark.parametrize("width", range(24, 90, 5))
def test_chinese_fills_its_lines_and_punctuation_begins_none(width):
    lines = fold(MIXED, width).split("\n")
    assert "".join(lines).replace(" ", "") == MIXED.replace(" ", "")
    assert max(map(_columns, lines)) <= width
    assert not [line for line in lines if line[0] in "，。；：）"]
    for line, after in itertools.pairwise(lines):  # nothing more fits: at most one word and its punctuation
        assert _columns(line) + _columns(after.split(" ")[0]) > width or len(after) < 3


def test_a_command_stays_on_its_line_however_long():
    command = "  clinometer generate runs/a-rather-long-name --prompt 'once upon a time'"
    assert fold(f"Generate text:\n{command}", 20) == f"Generate text:\n{command}"


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_folds(terminal):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=20, color_system=None)
    tell(console, "a sentence of more than twenty columns [bold]")
    assert shown.getvalue().count("\n") == (3 if terminal else 1)
    assert "[bold]" in shown.getvalue()
