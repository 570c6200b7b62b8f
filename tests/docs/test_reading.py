"""Pages are cut into prose, code and output, and outputs are written back where they belong."""

import sys
from pathlib import Path

import pytest

from clinometer.lessons.lesson_pages import Code, Prose, pieces
from tests.docs import pages as docs_pages
from tests.docs.write import rewritten

PAGE = """# 1. A page

Words, and `x = 1`.

```python
x = 3
print(x)
```

```text
2
```

```python title="train.py"
y = 4
```

Then

```console
$ clinometer learn
```

<!-- it would never end -->

```python no-run
while True: pass
```

```python
import train, step1
print(train.y, step1.x)
```

```text
stale
```
"""


def test_a_page_is_cut_into_prose_and_code_with_its_output():
    found = pieces(PAGE)
    codes = [piece for piece in found if isinstance(piece, Code)]
    assert [code.file for code in codes] == ["step1.py", "train.py", "step3.py", "step4.py"]
    assert [code.output for code in codes] == ["2\n", None, None, "stale\n"]
    assert [code.is_file for code in codes] == [False, True, False, False]
    assert [code.runs for code in codes] == [True, True, False, True]
    lines = PAGE.splitlines(keepends=True)
    for code in codes:
        assert "".join(lines[code.line : code.end - 1]) == code.text
    prose = [piece.text for piece in found if isinstance(piece, Prose)]
    assert "clinometer learn" in prose[1]
    assert "stale" not in "".join(prose)


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(docs_pages, "DOCS", tmp_path)
    path = tmp_path / "en" / "page.md"
    path.parent.mkdir()
    return path


def test_outputs_are_rewritten_added_and_removed(page):
    page.write_text(PAGE, encoding="utf-8")
    after = rewritten(page)
    codes = [piece for piece in pieces(after) if isinstance(piece, Code)]
    assert [code.output for code in codes] == ["3\n", None, None, "3\n4 3\n"]
    page.write_text(after, encoding="utf-8")
    assert rewritten(page) == after
    assert not {"step1", "train"} & set(sys.modules)


def test_times_and_the_temporary_folder_do_not_count(page):
    page.write_text(
        "```python\nimport os\nprint('took it in 1.5 s:', os.path.join(os.getcwd(), 'a.py'))\n```\n\n"
        "```text\ntook it in 0.2 s: a.py\n```\n",
        encoding="utf-8",
    )
    assert rewritten(page) == page.read_text(encoding="utf-8")


def test_what_a_block_raises_passes_through_with_its_line(page):
    page.write_text("```python\nx = 1\nx / 0\n```\n", encoding="utf-8")
    with pytest.raises(ZeroDivisionError) as raised:
        docs_pages.run(page)
    assert Path(raised.traceback[-1].path).name == "step1.py"
    assert raised.traceback[-1].lineno == 1
