"""Every `clinometer …` that a page shows is a command with such options."""

import re
import shlex
from pathlib import Path

import pytest

from clinometer.cli import build_app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```([\w-]*)[^\n]*\n(.*?)^```", re.S | re.M)
REMARK = re.compile(r"\s+#|\s{3,}")


def commands():
    """The page and the words of each; what is left out of one as "…" is left out."""
    for page in PAGES:
        for language, block in FENCED.findall(page.read_text(encoding="utf-8")):
            for line in block.splitlines():
                if language in ("", "console") and line.startswith("clinometer "):
                    told = REMARK.split(line, maxsplit=1)[0].replace("…", "")
                    yield page.relative_to(ROOT).as_posix(), shlex.split(told)[1:]


def launched():
    """The same of lines that start ranks: the words after torchrun."""
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("torchrun "):
                yield page.relative_to(ROOT).as_posix(), shlex.split(line.replace("…", ""))[1:]


@pytest.mark.parametrize(("page", "words"), list(launched()))
def test_torchrun_takes_what_is_shown_and_leaves_us_the_rest(page, words):
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words)
    assert (given.module, given.training_script) == (True, "clinometer")
    build_app().parse_args(given.training_script_args, exit_on_error=False, print_error=False)


def test_pages_show_commands():
    assert len({page for page, _ in commands()}) >= 8
    assert len(list(commands())) > 40


@pytest.mark.parametrize(("page", "words"), list(commands()))
def test_a_shown_command_is_one(page, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.toml").touch()  # a configuration is read with the options
    build_app().parse_args(words, exit_on_error=False, print_error=False)


@pytest.mark.parametrize("words", [["train", "--corpse", "book.txt"], ["reprot", "runs/book"]])
def test_what_is_no_command_is_noticed(words):
    with pytest.raises(Exception, match=r"corpse|reprot"):
        build_app().parse_args(words, exit_on_error=False, print_error=False)
