"""docs/*/reliability.md names tests and soaks that exist, the same in both languages."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LANGUAGES = ("en", "zh")


def page(language):
    return (ROOT / "docs" / language / "reliability.md").read_text(encoding="utf-8")


def named(text):
    """(files, tests) that stand there as code."""
    code = set(re.findall(r"`([^`\n]+)`", text))
    return {c for c in code if c.startswith("tests/")}, {c for c in code if re.fullmatch(r"test_\w+", c)}


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_the_page_names_is_there(language):
    files, tests = named(page(language))
    assert len(files) >= 10
    assert len(tests) >= 30
    assert [file for file in files if not (ROOT / file).is_file()] == []
    sources = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    assert [test for test in tests if f"def {test}(" not in sources] == []


def test_both_pages_name_the_same():
    assert named(page("en")) == named(page("zh"))
