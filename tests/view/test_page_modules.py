"""What can be said of the page's files without a browser."""

import re
from pathlib import Path

import pytest

import clinometer

STATIC = Path(clinometer.__file__).parent / "view" / "static"
MODULES = sorted(STATIC.rglob("*.js"))
MARKUP = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
IMPORT = r'^import \{([^}]*)\} from "([^"]+)";'


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_a_module_makes_no_markup_from_text_and_stays_short(path):
    text = path.read_text(encoding="utf-8")
    assert re.findall(MARKUP, text) == []
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == []
    assert len(text.splitlines()) <= 350


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_a_module_imports_what_is_there_and_uses_it(path):
    text = path.read_text(encoding="utf-8")
    for names, source in re.findall(IMPORT, text, re.M):
        exported = (path.parent / source).read_text(encoding="utf-8")
        for name in filter(None, map(str.strip, names.split(","))):
            made = rf"^export (async )?(function|class|const|let) {name}\b"
            assert re.search(made, exported, re.M), (source, name)
            assert len(re.findall(rf"\b{name}\b", text)) > 1, name


def test_the_page_has_no_inline_script_or_style():
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", page) == []
