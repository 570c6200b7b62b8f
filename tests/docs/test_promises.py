"""What pages say of the code is so: modules, imports, rooms, counts of bugs and statistics."""

import re
from importlib import import_module
from pathlib import Path

import pytest

import clinometer
from clinometer.vocabulary import STATISTICS

ROOT = Path(__file__).parent.parent.parent
PAGES = [
    *sorted((ROOT / "docs" / "en").rglob("*.md")),
    *sorted((ROOT / "docs" / "zh").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md")),
]
COUNTS = {"en": {8: "eight", 11: "eleven"}, "zh": {8: "八个", 11: "十一个"}}


def named(path):
    return str(path.relative_to(ROOT))


def page(language, name):
    return (ROOT / "docs" / language / name).read_text(encoding="utf-8")


def resolves(dotted):
    """Whether a dotted path is a module, or a name in one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:length]))
        except ImportError:
            continue
        return all((found := getattr(found, part, None)) is not None for part in parts[length:])
    return False


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_a_module_that_a_page_names_exists(path):
    dotted = set(re.findall(r"\bclinometer(?:\.[A-Za-z_]+)+", path.read_text(encoding="utf-8")))
    assert sorted(name for name in dotted if not resolves(name)) == []


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_a_file_of_ours_that_a_page_names_exists(path):
    text = path.read_text(encoding="utf-8")
    files = set(re.findall(r"(?<![\w/])(?:src/clinometer|benchmarks|examples)/[\w/.-]+\.\w+", text))
    assert sorted(name for name in files if not (ROOT / name).exists()) == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_reference_says_where_each_name_is_imported_from(language):
    text = page(language, "reference.md")
    intro = text.partition("##")[0]
    listed = [path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)$", text, re.M)]
    assert len(listed) > 20
    for name in listed:
        assert (name in clinometer.__all__) != (f"`{name}`" in intro), name
    for name, module in (
        ("RunFile", "clinometer.record"),
        ("Watch", "clinometer.monitoring.watch"),
        ("Sink", "clinometer.monitoring.watch"),
        ("Muon", "clinometer.optim.muon"),
    ):
        assert f"`{module}`" in intro
        assert hasattr(import_module(module), name)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_pages_count_the_bugs_of_the_gallery_and_the_statistics_of_watch(language):
    bugs = len(re.findall(r"^## \d+\. ", page(language, "gallery.md"), re.M))
    for name in ("index.md", "guide/debug.md", "gallery.md"):
        assert COUNTS[language][bugs] in page(language, name).lower(), name
    for name in ("guide/how-it-works.md", "guide/watch.md"):
        assert COUNTS[language][len(STATISTICS)] in page(language, name).lower(), name


def test_no_page_shows_an_argument_that_is_gone():
    gone = ("forward_mode",)
    assert [(named(p), word) for p in PAGES for word in gone if word in p.read_text(encoding="utf-8")] == []


def test_the_tree_of_rooms_is_the_packages_own():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = re.search(r"^src/clinometer/\n(.*?)^```", text, re.M | re.S)
    assert tree is not None
    shown, room = set(), ""
    for line in tree[1].splitlines():
        if found := re.match(r"([│ ]*)[├└]── (\w+)/", line):
            room = room if found[1] else found[2]
            shown.add(f"{room}/{found[2]}" if found[1] else room)
    package = ROOT / "src" / "clinometer"
    inner = [path.relative_to(package) for path in package.glob("*/*/__init__.py")]
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    rooms |= {path.parent.as_posix() for path in inner} | {"view/static"}
    assert shown == rooms
