"""The pages print the same on processors with other instructions; `make pages` tries more of them."""

import pytest
import torch

from tests.docs import pages as docs_pages
from tests.docs.pages import DOCS, pages, run
from tests.docs.stability import OLDEST, differences, round_otherwise

# Both languages run the same code: tests/docs/test_pages.py.
ENGLISH = [path for path in pages() if path.is_relative_to(DOCS / "en")]
CHAOTIC = """```python
import torch
x = torch.tensor([[0.3]], dtype=torch.float64)
for step in range({steps}):
    x = 4 * x @ (1 - x)
print(f"{{x.item():.2f}}")
```
"""


@pytest.mark.parametrize(
    ("variables", "factor"),
    [(OLDEST, None), ({}, -1.0)],
    ids=["the oldest instructions", "rounded the other way"],
)
def test_every_page_prints_the_same_on_another_processor(variables, factor):
    found = differences(ENGLISH, variables, factor)
    assert not found, "\n".join(found)


def test_a_number_at_which_chaos_arrives_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(docs_pages, "DOCS", tmp_path)
    printed = {}
    for steps in (10, 80):
        page = tmp_path / "en" / f"{steps}.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(CHAOTIC.format(steps=steps), encoding="utf-8")
        (here,) = run(page)
        library = round_otherwise(-1.0)
        (there,) = run(page)
        del library
        printed[steps] = (here.printed, there.printed)
    assert printed[10][0] == printed[10][1]
    assert printed[80][0] != printed[80][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_otherwise_moves_what_is_rounded_and_ends(dtype):
    a, b, whole = (
        torch.randn(32, 64, dtype=dtype),
        torch.randn(64, 32, dtype=dtype),
        torch.eye(3, dtype=dtype),
    )
    native = a @ b
    library = round_otherwise(-1.0)
    moved = a @ b
    assert torch.equal(whole @ (3 * whole), 3 * whole)
    del library
    difference = (moved - native).abs().max() / native.abs().max()
    assert 0 < difference < 10 * torch.finfo(dtype).eps
    assert torch.equal(a @ b, native)
