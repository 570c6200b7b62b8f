"""`clinometer learn`: the list, a lesson that runs in the terminal, a lesson as a notebook."""

import io
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from rich.console import Console

from clinometer import cli
from clinometer.lessons import lesson_pages
from clinometer.lessons.lesson_notebook import notebook
from clinometer.lessons.lesson_pages import Code, Lesson, pieces
from clinometer.lessons.terminal import ONWARD, show
from clinometer.messages import InputError, set_language

ROOT = Path(__file__).parents[2]
SMALL = """# 1. Small

A page for this test, and a [link](../causes.md).

<!-- not for readers -->

![What is drawn](../../images/lessons/error-curve.svg)

```python title="kept.py"
x = 41
```

```python
import kept
print(kept.x + 1)
```

```text
42
```

```python
print("second")
```

Next: [another lesson](2-another.md).
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "1-small.md"
    path.write_text(SMALL, encoding="utf-8")
    return Lesson(1, "Small", "A page for this test.", path)


@pytest.fixture
def learn(monkeypatch, capsys):
    """The exit code and what was printed of `clinometer learn …`."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["clinometer", "learn", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        set_language(None)
        heard = capsys.readouterr()
        return ended.value.code, heard.out + heard.err

    return call


def shown(lesson, answers=None):
    """What the console showed, and whether the lesson was finished; `answers` are typed at the prompts."""
    heard = io.StringIO()
    console = Console(file=heard, width=100)
    if answers is not None:
        typed = iter(answers)
        console.input = lambda prompt: next(typed)
    finished = show(console, lesson, waits=answers is not None)
    return heard.getvalue(), finished


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_line_that_leads_to_the_next_lesson_is_known(language):
    for lesson in lesson_pages.lessons(language):
        text = lesson.path.read_text(encoding="utf-8")
        assert len(ONWARD.findall(text)) == (lesson.number < 8), lesson.path


@pytest.mark.parametrize("language", ["en", "zh"])
def test_there_are_eight_lessons_in_both_languages_each_with_a_title_and_a_summary(language):
    found = lesson_pages.lessons(language)
    assert [lesson.number for lesson in found] == list(range(1, 9))
    assert [lesson.path.name for lesson in found] == [
        lesson.path.name for lesson in lesson_pages.lessons("en")
    ]
    assert all(lesson.title and 10 < len(lesson.summary) < 130 for lesson in found)
    index = (lesson_pages.folder(language) / "index.md").read_text(encoding="utf-8")
    for lesson in found:
        assert f"[{lesson.title}]({lesson.path.name})" in index


def test_the_list_shows_every_lesson_in_the_language_asked_for(learn):
    for language in ("en", "zh"):
        code, text = learn("--language", language)
        assert code == 0
        for lesson in lesson_pages.lessons(language):
            assert lesson.title in text


def test_the_list_needs_no_torch():
    script = (
        "import sys; sys.argv = ['clinometer', 'learn']\nfrom clinometer.cli import main\n"
        "try: main()\nexcept SystemExit: pass\nassert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_a_lesson_shows_prose_and_code_and_really_runs_it(small, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text, finished = shown(small)
    assert finished
    assert capsys.readouterr().out == "42\nsecond\n"
    for words in (
        "A page for this test, and a link.",
        "Figure: What is drawn",
        "kept.py",
        "print(kept.x + 1)",
    ):
        assert words in text
    for words in (
        "not for readers",
        "causes.md",
        "another",
        "42",
    ):  # the number comes from the run, not from the page
        assert words not in text
    assert Path.cwd() == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["1-small.md"]
    assert "kept" not in sys.modules


def test_enter_runs_a_block_and_q_ends_the_lesson(small, capsys):
    text, finished = shown(small, ["", "q"])
    assert not finished
    assert capsys.readouterr().out == "42\n"
    assert "second" in text  # its code was shown before the question
    assert shown(small, ["", ""])[1]


def test_input_that_ends_goes_on(small, capsys):
    console = Console(file=io.StringIO())

    def ended(prompt):
        raise EOFError

    console.input = ended
    assert show(console, small, waits=True)
    assert capsys.readouterr().out == "42\nsecond\n"


def test_without_a_terminal_a_lesson_runs_straight_through(learn, monkeypatch, small):
    monkeypatch.setattr(lesson_pages, "lesson", lambda number, language: small)
    code, text = learn(1)
    assert code == 0
    assert "second" in text
    assert "clinometer learn 2" in text


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("number", range(1, 9))
def test_a_notebook_is_valid_and_holds_the_page(language, number):
    lesson = lesson_pages.lesson(number, language)
    page = nbformat.reads(notebook(lesson, language), as_version=4)
    nbformat.validate(page)
    assert page.cells[0].source.startswith("# ")
    assert f'set_language("{language}")' in page.cells[1].source
    found = [p for p in pieces(lesson.path.read_text(encoding="utf-8")) if isinstance(p, Code) and p.runs]
    cells = [cell for cell in page.cells[2:] if cell.cell_type == "code"]
    assert len(cells) == len(found)
    for cell, code in zip(cells, found, strict=True):
        assert code.text.strip("\n") in cell.source
        assert cell.source.startswith(f"%%writefile {code.file}\n") == code.is_file
        assert not cell.outputs
    for cell in page.cells:
        assert cell.cell_type == "code" or "](../" not in cell.source
    figures = [name for cell in page.cells for name in cell.get("attachments", {})]
    assert len(figures) == (number in (2, 7))


def test_a_notebook_is_written_once_and_replaced_only_when_asked(learn, tmp_path):
    path = tmp_path / "three.ipynb"
    assert learn(3, "--notebook", path)[0] == 0
    first = path.read_bytes()
    assert json.loads(first)["nbformat"] == 4
    code, text = learn(4, "--notebook", path)
    assert (code, path.read_bytes()) == (2, first)
    assert "--overwrite" in text
    assert learn(4, "--notebook", path, "--overwrite")[0] == 0
    assert path.read_bytes() != first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((9,), ["9", "1", "8"]),
        ((0,), ["0", "clinometer learn"]),
        (("three",), ["three", "LESSON"]),
        (("--notebook", "a.ipynb"), ["a.ipynb", "clinometer learn 1"]),
        ((1, "--notebook", "a.txt"), ["a.txt", ".ipynb"]),
        ((1, "--notebook", "no/where/a.ipynb"), ["a.ipynb", "No such file"]),
    ],
)
def test_wrong_use_is_explained(learn, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, text = learn(*arguments)
    assert code == 2
    for word in words:
        assert word in text
    assert not list(tmp_path.iterdir())


def test_an_installed_package_reads_the_pages_that_came_with_it(monkeypatch, tmp_path):
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = table["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for source, target in included.items():
        assert (ROOT / source).is_dir()
        (tmp_path / Path(target).name).mkdir()
    monkeypatch.setattr(lesson_pages, "__file__", str(tmp_path / "pages.py"))
    assert {lesson_pages.folder("en"), lesson_pages.folder("zh"), lesson_pages.images()} == set(
        tmp_path.iterdir()
    )
    lesson_pages.lessons.cache_clear()
    with pytest.raises(InputError):
        lesson_pages.lesson(1, "en")
    lesson_pages.lessons.cache_clear()
