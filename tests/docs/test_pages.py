"""Every ```python block of docs/en and docs/zh runs, and every page shows what its code printed."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from clinometer.lessons.lesson_pages import Code, Prose, pieces
from tests.docs import figures
from tests.docs.pages import DOCS, OWN_TESTS, name_of, numbers, pages, run, same, without_rounding

PAGES = pages()


def of(path: Path):
    return pieces(path.read_text(encoding="utf-8"))


@cache
def once(path: Path):
    """What the blocks printed, and the variables they left."""
    left: dict[str, Any] = {}
    return run(path, left), left


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_code_runs_and_the_page_shows_what_it_printed(path):
    for ran in once(path)[0]:
        shown = ran.code.output or ""
        place = f"{name_of(path)}:{ran.code.line + 1} (python -m tests.docs.write writes it)"
        assert same(shown, ran.printed), f"{place}\nshown:\n{shown}\nprinted:\n{ran.printed}"
        for number, limit in ran.rounding:
            assert abs(number) <= limit, f"{place}: rounding left {number}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_decimal_in_the_prose_was_printed_or_stands_in_the_code(path):
    found = of(path)
    known = set()
    for piece in found:
        if isinstance(piece, Code):
            known |= numbers(piece.text) | numbers(piece.output or "")
    prose = "\n".join(piece.text for piece in found if isinstance(piece, Prose))
    prose = re.sub(r"<!--.*?-->|\]\([^)]*\)", "", prose, flags=re.S)
    assert numbers(prose) <= known, sorted(numbers(prose) - known)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_a_block_that_does_not_run_says_why(path):
    before = None
    for piece in of(path):
        if isinstance(piece, Code) and not piece.runs:
            assert isinstance(before, Prose)
            assert re.search(r"<!--.+?-->\s*\Z", before.text, re.S), f"{name_of(path)}:{piece.line}"
        before = piece


@pytest.mark.parametrize("path", [p for p in PAGES if name_of(p).startswith("en/")], ids=name_of)
def test_both_languages_run_the_same_code(path):
    other = DOCS / "zh" / path.relative_to(DOCS / "en")
    mine, theirs = ([p for p in of(q) if isinstance(p, Code)] for q in (path, other))
    assert len(mine) == len(theirs)
    for one, two in zip(mine, theirs, strict=True):
        assert (one.file, one.runs, bool(one.output)) == (two.file, two.runs, bool(two.output))
        assert _without_words(one.text) == _without_words(two.text), one.text


@pytest.mark.parametrize("path", sorted((DOCS).rglob("*.md")), ids=name_of)
def test_links_and_figures_of_a_page_are_there(path):
    text = re.sub(r"^(`{3,}).*?^\1", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"`[^`\n]*`", "", text)):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_figures_show_what_their_pages_compute():
    for name, drawn in figures.figures(*(once(page)[1] for page in figures.PAGES)).items():
        kept, fresh = (
            list(ElementTree.fromstring(text).iter())
            for text in ((figures.IMAGES / name).read_text(encoding="utf-8"), drawn)
        )
        assert [(e.tag, e.get("class"), e.text) for e in kept] == [
            (e.tag, e.get("class"), e.text) for e in fresh
        ]
        for one, two in zip(kept, fresh, strict=True):
            assert _numbers(one, "d") == pytest.approx(_numbers(two, "d"), abs=1), name
            points, drawn_now = _numbers(one, "points"), _numbers(two, "points")
            assert points[::2] == drawn_now[::2], name
            # Where the loss bends, the error is mathematics; at smaller steps it is rounding.
            assert points[:8] == pytest.approx(drawn_now[:8], abs=1), name
        if name.startswith("error-curve"):
            best = [max(_numbers(line, "points")[1::2]) for line in fresh if line.get("points")]
            assert best[1] - best[0] > 100, "float64 comes five powers of ten nearer to the truth"


def _numbers(element: ElementTree.Element, attribute: str) -> list[float]:
    return [float(text) for text in re.findall(r"-?[\d.]+", element.get(attribute, ""))]


def test_pages_with_a_test_of_their_own_exist():
    for page, test in OWN_TESTS.items():
        assert (DOCS / "en" / page).exists()
        assert (DOCS.parent / test.partition(":")[0]).exists()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("loss 0.5, then −3.2e-05 and 1e-7.", {0.5, 3.2e-05, 1e-7}),
        ("版本 v2.10、model.0.weight、1,024 和 8", set()),
        ("损失是0.25。", {0.25}),
    ],
)
def test_decimals_are_found_in_prose(text, found):
    assert numbers(text) == found


@pytest.mark.parametrize(
    ("shown", "printed", "equal"),
    [
        ("loss 1.2345", "loss 1.2346", True),
        ("loss 1.2345", "loss 1.2347", False),
        ("loss 0.5 in 0.2 s", "loss 0.5 in 12.4 s", True),
        ("loss 1.23e-07", "loss 1.22e-07", True),
        ("loss −0.5", "loss 0.5", False),
        ("3 tensors of 1.25", "4 tensors of 1.25", False),
        ("nan", "1.0", False),
    ],
)
def test_numbers_may_differ_in_their_last_digits_only(shown, printed, equal):
    assert same(shown, printed) is equal


def test_what_only_rounding_decides_is_left_out_and_has_a_limit():
    printed = "a  34 %  0.5 %       1.2\n(largest error:\n  0.03) (remainder −4e-17) error 0.03"
    shown, rounding = without_rounding(printed)
    assert shown == "a  34 %  0.5 %         …\n(largest error:\n  …) (remainder …) error 0.03"
    assert rounding == [(0.03, 1.0), (-4e-17, 1e-12), (1.2, 4.0)]


def _without_words(code: str) -> str:
    """The code as a tree without the words in its strings: those are translated."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            node.values = [value for value in node.values if not isinstance(value, ast.Constant)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.dump(tree)
