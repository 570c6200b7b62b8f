"""The page of causes: each block of code runs, and diagnose finds exactly the cause it stands under."""

import ast
import re
from pathlib import Path

import pytest
import torch

from clinometer.messages import sentences

DOCS = Path(__file__).parents[3] / "docs"
ENTRY = re.compile(r"^### (\S+)\n\n```python\n(.*?)```\n\n(\S+)", re.M | re.S)


def entries(language):
    """(status, cause, line, code, first word of the text) for each entry of the page."""
    text = (DOCS / language / "causes.md").read_text(encoding="utf-8")
    for section in re.finditer(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, re.M | re.S):
        if section[1] == "steps":  # tests/monitoring runs those: they need many steps
            continue
        for entry in ENTRY.finditer(section[2]):
            start = text[: section.start(2) + entry.start(2)].count("\n")
            yield section[1], entry[1], start, entry[2], entry[3]


ENTRIES = [(lang, *entry) for lang in ("en", "zh") for entry in entries(lang)]


def run(code, file, line):
    """What the last line of the code gives; its lines are lines of the page."""
    preamble = re.search(r"```python\n(.*?)```", Path(file).read_text(encoding="utf-8"), re.S)[1]
    tree = ast.parse(code)
    ast.increment_lineno(tree, line)
    last = tree.body.pop()
    assert isinstance(last, ast.Expr)
    names = {}
    exec(preamble, names)
    exec(compile(tree, file, "exec"), names)
    return eval(compile(ast.Expression(last.value), file, "eval"), names)


@pytest.mark.parametrize(
    ("language", "status", "cause", "line", "code", "word"),
    ENTRIES,
    ids=[f"{entry[0]}-{entry[1]}-{entry[2]}" for entry in ENTRIES],
)
def test_the_smallest_code_that_shows_a_cause_shows_it(language, status, cause, line, code, word):
    torch.manual_seed(0)
    assert len(code.splitlines()) <= 12
    page = str(DOCS / language / "causes.md")
    found = run(code, page, line)
    # What moves while frozen is frozen, too.
    findings = [f for f in found.findings if cause != "moved-while-frozen" or f.cause != "frozen"]
    assert {f.cause for f in findings} == {cause}, found.render()
    for finding in findings:
        assert finding.status == status or (status, finding.status) == ("zero", "partly-zero")
        explained = word.startswith(("Explained", "解释"))
        assert (finding.severity == "explained") == explained
        if finding.where is not None:
            lines = Path(page).read_text(encoding="utf-8").splitlines()
            assert finding.where.file == page
            assert lines[finding.where.line - 1].strip() in code


def test_every_cause_that_has_sentences_is_on_the_page_and_the_other_way_round():
    spoken = {
        tuple(key.split(".")[1:3])
        for key in sentences("en")
        if key.startswith("diagnosis.") and key.count(".") > 2
    }
    spoken = {(status.replace("partly-", ""), cause) for status, cause in spoken if cause != "unknown"}
    for language in ("en", "zh"):
        assert {(status, cause) for status, cause, *_ in entries(language)} == spoken


def test_both_languages_show_the_same_code():
    assert [e[:2] + e[3:4] for e in entries("en")] == [e[:2] + e[3:4] for e in entries("zh")]
