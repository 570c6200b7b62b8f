"""The live view of a notebook, drawn by Chromium from what Python gives it."""

import json
from pathlib import Path

import pytest

from clinometer.integrations import notebook

LIVE = Path(notebook.__file__).parent / "live"

SHOWN = {
    "title": "a <b>run</b>",
    "live": True,
    "facts": ["live", "step 6", "loss 0.5"],
    "loss": {"step": [1, 2, 3, 4, 5, 6], "value": [3.0, 2.0, None, 1.0, 0.7, 0.5]},
    "loss_label": "loss",
    "alerts": [{"text": "Step 3: <i>NaN</i>", "open": True, "severity": "fault"}],
    "tensors": {
        "columns": ["tensor", "gradient norm"],
        "rows": [["0.weight", "0.12"], ["0.bias", "–"]],
        "more": "and 3 tensors more",
    },
}

PAGE = """<!doctype html><meta charset="utf-8"><style>{css}</style><div id="place"></div>
<script type="module">
const heard = [];
const model = {{
  shown: {shown},
  get(name) {{ return this[name]; }},
  on(name, call) {{ heard.push([name, call]); }},
  off(name, call) {{ heard.splice(heard.findIndex((h) => h[1] === call), 1); }},
}};
const code = new Blob([{code}], {{ type: "text/javascript" }});
const {{ default: widget }} = await import(URL.createObjectURL(code));
window.leave = widget.render({{ model, el: document.getElementById("place") }});
window.give = (shown) => {{ model.shown = shown; for (const [, call] of heard) call(); }};
window.heard = heard;
</script>"""


@pytest.fixture
def page(browser, tmp_path):
    file = tmp_path / "page.html"
    css, code = ((LIVE / name).read_text(encoding="utf-8") for name in ("live.css", "live.js"))
    text = PAGE.format(css=css, shown=json.dumps(SHOWN), code=json.dumps(code))
    file.write_text(text, encoding="utf-8")
    page = browser.new_page(viewport={"width": 760, "height": 480})
    said = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text))
    page.goto(file.as_uri())
    page.wait_for_function("!!window.leave")
    yield page
    page.close()
    assert said == []


def test_it_draws_the_curve_with_its_gap_the_alerts_and_the_table(page):
    assert page.locator("strong").inner_text() == "a <b>run</b>"  # text, whatever a name holds
    assert page.locator(".head span").inner_text().endswith("live · step 6 · loss 0.5")
    line = page.locator("svg .line").get_attribute("d")
    assert (line.count("M"), line.count("L")) == (2, 3)  # four steps and two more, with a gap between
    assert page.locator("svg text").all_text_contents() == ["3.00", "0.500", "1", "6"]
    assert page.locator(".alerts li.open.fault").inner_text() == "Step 3: <i>NaN</i>"
    assert page.locator("td").all_inner_texts() == ["0.weight", "0.12", "0.bias", "–"]
    assert page.locator(".more").inner_text() == "and 3 tensors more"


def test_it_follows_what_python_sends_and_lets_go(page):
    later = SHOWN | {"live": False, "loss": {"step": [], "value": []}, "alerts": []}
    later |= {"tensors": {"columns": [], "rows": [], "more": ""}}
    page.evaluate("(shown) => window.give(shown)", later)
    assert page.locator("svg .line").count() == page.locator("li").count() == page.locator("td").count() == 0
    page.evaluate("(shown) => window.give(shown)", later | {"loss": {"step": [1], "value": [2.5]}})
    assert page.locator("svg circle").count() == 1
    page.evaluate("window.leave()")
    assert page.evaluate("window.heard.length") == 0
