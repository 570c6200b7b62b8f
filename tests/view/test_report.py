"""The report: one file, both languages, safe names, and nothing that is loaded from elsewhere."""

import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from clinometer.commands.report import report_command
from clinometer.commands.view import view_command
from clinometer.messages import InputError, set_language
from clinometer.record.read.reader import RunFile
from clinometer.record.write.recorder import Recorder
from clinometer.view.report import _in_script, _safe_script, report, write_report
from tests.view.conftest import EVIL, record


class Page(HTMLParser):
    """What a browser would make of it: elements with their attributes, and the text of scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.text, self.inside = [], [], "", ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text += data


@pytest.fixture(scope="module")
def pages(run):
    return {language: Page(report(run, language)) for language in ("en", "zh")}


def test_it_holds_the_figures_of_both_themes_the_alerts_and_every_tensor(pages, run):
    for language, words in (("en", "Gradient map"), ("zh", "梯度图")):
        page = pages[language]
        assert words in page.text
        drawn = json.loads(page.scripts[0], parse_constant=pytest.fail)
        assert set(drawn) == {"loss", "map", "norm", "lr", "speed"}
        assert all(set(both) == {"light", "dark"} for both in drawn.values())
        places = [attributes["data-figure"] for _, attributes in page.elements if "data-figure" in attributes]
        assert places == list(drawn)
        for tensor in run.tensors():
            assert tensor["name"] in page.text


def test_it_loads_nothing(pages):
    for page in pages.values():
        loading = {"src", "href", "srcset", "action", "data", "poster", "background"}
        for tag, attributes in page.elements:
            assert not loading & set(attributes), (tag, attributes)
            assert tag not in ("link", "iframe", "img", "object", "embed", "base", "form")
        (policy,) = [a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a]
        assert policy.startswith("default-src 'none'")
        assert "http" not in policy
        assert len(page.scripts) == 3


def test_names_in_it_are_text(tmp_path):
    folder = record(tmp_path / "r", [EVIL], name=EVIL, config={EVIL: EVIL}, environment={"x": EVIL})
    recorder = Recorder(folder, continue_from=20)
    recorder.event(20, 1.79e9, "report", {"kind": "check", "title": EVIL, "text": {"en": EVIL, "zh": EVIL}})
    alert = {"id": 0, "cause": EVIL, "severity": '"><b>', "step": 3, "until": None, "tensors": [EVIL]}
    recorder.alert({**alert, "values": {}, "key": EVIL, "remedy": "{x.y[z]}"})
    recorder.close("done")
    text = report(RunFile.open(folder), "en")
    page = Page(text)
    assert len(page.scripts) == 3
    assert not [tag for tag, _ in page.elements if tag in ("img", "b") and tag != "b"]
    assert "<img" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert json.loads(page.scripts[0])
    assert page.text.count(EVIL) >= 5


def test_no_text_ends_the_script_that_holds_the_figures():
    held = {EVIL: ["</ScRiPt >", "<!--<script>", "&\u2028", float("nan")]}
    text = _in_script(held)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {EVIL: ["</ScRiPt >", "<!--<script>", "&\u2028", None]}
    assert "</script" not in _safe_script().lower()


def test_a_run_without_steps_has_a_report_too(tmp_path):
    recorder = Recorder(tmp_path / "r")
    recorder.begin(
        {"name": "r", "started": 1.79e9, "config": {}, "environment": {}, "every": 1}
        | {"statistics": [], "model": None, "optimizers": []}
    )
    recorder.tensors([])
    recorder.close("stopped")
    page = Page(report(RunFile.open(tmp_path / "r"), "zh"))
    assert json.loads(page.scripts[0]) == {}
    assert "没有记录任何一步" in page.text


def test_it_is_written_whole_and_over_nothing_else(tmp_path, run):
    to = tmp_path / "new" / "r.html"
    assert write_report(run, to, "en") == to.stat().st_size
    assert write_report(run, to, "zh") == to.stat().st_size
    assert [path.name for path in to.parent.iterdir()] == ["r.html"]
    mine = tmp_path / "mine.html"
    mine.write_text("my own page")
    for path, key in (
        (mine, "view.report_exists"),
        (tmp_path / "r.pdf", "view.report_not_html"),
        (mine / "r.html", "view.report_not_written"),
    ):
        with pytest.raises(InputError) as refused:
            write_report(run, path, "en")
        assert refused.value.key == key
        assert refused.value.render("zh")
    assert mine.read_text() == "my own page"


def test_the_command_says_what_it_wrote(tmp_path, run):
    said = io.StringIO()
    set_language("zh")
    try:
        assert report_command(Console(file=said, width=200), run.folder, tmp_path / "r.html") == 0
    finally:
        set_language(None)
    assert "已写入" in said.getvalue()
    assert "梯度图" in (tmp_path / "r.html").read_text(encoding="utf-8")
    with pytest.raises(InputError):
        report_command(Console(file=said), tmp_path / "nowhere", tmp_path / "x.html")


def test_view_of_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError) as refused:
        view_command(Console(file=io.StringIO()), tmp_path / "nowhere")
    assert refused.value.key == "view.missing"
