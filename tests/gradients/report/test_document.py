import io
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from clinometer.gradients.report.document import (
    BLANK,
    HTML,
    RICH,
    Line,
    Span,
    Table,
    code,
    dim,
    fault,
    name,
    number,
    sentence,
    to_html,
    to_rich,
    to_text,
)
from clinometer.gradients.report.formatting import cell_width

DOCUMENT = [
    Line((fault("✗ "), "27 parameters have no gradient: the path is cut"), hang=2),
    Line((dim("model.py:41   "), code("h = h.detach()")), indent=4),
    BLANK,
    Table([["gradient", number("+1.842e-03"), "clipped"], ["梯度", number("0"), "β₁ m"]], "lrl", indent=2),
]


def test_text_has_indents_and_aligned_columns():
    assert to_text(DOCUMENT).splitlines() == [
        "✗ 27 parameters have no gradient: the path is cut",
        "    model.py:41   h = h.detach()",
        "",
        "  gradient  +1.842e-03  clipped",
        "  梯度               0  β₁ m",
    ]


def test_a_long_line_is_wrapped_with_its_hang():
    line = Line((fault("✗ "), "one two three four five six"), indent=1, hang=2)
    assert to_text([line], 16).splitlines() == [" ✗ one two three", "   four five six"]


def test_what_a_no_break_space_holds_together_stays_together():
    formula = "lr √(1−β₂ᵗ)/(1−β₁ᵗ), lr\u00a0=\u00a00.0007361"
    assert to_text([Line(formula)], 30).splitlines() == ["lr √(1−β₂ᵗ)/(1−β₁ᵗ),", "lr = 0.0007361"]


def test_chinese_is_wrapped_between_characters_but_not_before_its_punctuation():
    line = Line("保留数值，却不再记得它从哪里来。")
    lines = to_text([line], 8).splitlines()
    assert "".join(lines) == "保留数值，却不再记得它从哪里来。"
    assert all(cell_width(part) <= 8 for part in lines)
    assert not any(part[0] in "，。" for part in lines)
    assert lines[0] == "保留数"


def test_a_quoted_line_is_kept_whole_where_it_fits_and_its_spaces_stay():
    quoted = code("x = torch.where(mask,  a, b)")
    lines = to_text([Line((dim("model.py:41   "), quoted))], 32).splitlines()
    assert lines == ["model.py:41", "x = torch.where(mask,  a, b)"]
    assert "mask,  a" in to_text([Line((quoted,))], 80)


@given(
    texts=st.lists(st.text("ab 梯度，。(", max_size=30), max_size=5),
    width=st.integers(20, 60),
    indent=st.integers(0, 6),
    hang=st.integers(0, 4),
)
def test_wrapping_loses_no_character_and_overflows_only_where_nothing_can_break(texts, width, indent, hang):
    line = Line([Span(text, "name" if i % 2 else "") for i, text in enumerate(texts)], indent, hang)
    out = to_text([line], width)
    assert re.sub(r"\s", "", out) == re.sub(r"\s", "", "".join(texts))
    for part in out.splitlines():
        assert cell_width(part) <= width or not re.search(r"\S\s+\S", part) or "，" in part or "。" in part


def test_the_last_column_of_a_table_wraps_under_itself():
    table = Table([["name", "a sentence that is too long for this width"]], indent=1)
    assert to_text([table], 30).splitlines() == [
        " name  a sentence that is too",
        "       long for this width",
    ]


def test_a_table_may_have_rows_of_different_lengths():
    table = Table([["a", "b", "c"], ["long"], []], "rrr")
    assert to_text([table]).split("\n") == ["   a  b  c", "long", ""]


def test_rich_shows_the_same_text_with_colours():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="standard", width=100)
    for line in to_rich(DOCUMENT, 100):
        console.print(line)
    coloured = stream.getvalue()
    assert "\x1b[1;31m✗" in coloured
    plain = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert [line.rstrip() for line in plain.splitlines()] == to_text(DOCUMENT).splitlines()


def test_brackets_are_not_read_as_rich_markup():
    (line,) = to_rich([Line((name("w[bold]x[/bold]"),))])
    assert line.plain == "w[bold]x[/bold]"


class Seen(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html_is_balanced_escaped_and_loads_nothing():
    seen = Seen(to_html([*DOCUMENT, Line((code("if a < b: x = '<script>alert(1)</script>'"), name("&lt;")))]))
    assert seen.open == []
    assert {tag for tag, _ in seen.tags} == {"div", "span", "table", "tr", "td"}
    assert all(set(attrs) <= {"style", "class"} for _, attrs in seen.tags)
    assert not any("url(" in attrs.get("style", "") for _, attrs in seen.tags)
    assert "if a < b: x = '<script>alert(1)</script>'&lt;" in seen.text


def luminance(colour):
    def linear(c):
        return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4

    r, g, b = (linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a, b):
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("role", [role for role, style in HTML.items() if "color:" in style])
def test_a_colour_reads_on_white_and_on_a_dark_notebook(role):
    colour = re.search(r"#[0-9a-f]{6}", HTML[role]).group()
    ratios = contrast(colour, "#ffffff"), contrast(colour, "#111111")
    assert min(ratios) >= 3.9, ratios


def test_every_role_has_a_look_everywhere():
    assert set(RICH) == set(HTML) == {"fault", "note", "ok", "code", "number", "name", "dim", "strong"}


def test_a_sentence_keeps_the_roles_of_its_values():
    spans = sentence("gradients.list.more", "zh", names=name("a、b"), count=3)
    assert spans == (name("a、b"), Span("，另有 "), Span("3"), Span(" 个"))
    spans = sentence("gradients.subject.same_name", "en", name="w")
    assert "".join(span.text for span in spans) == (
        "Two different tensors are named 'w'; give each its own name."
    )
    spans = sentence("gradients.subject.bare_tensor", "en")
    assert '{"weight": tensor}' in "".join(span.text for span in spans)
    with pytest.raises(KeyError):
        sentence("gradients.subject.same_name", "en")
