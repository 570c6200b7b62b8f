"""Every page, reached by clicking as a reader would, in both languages and both themes."""

import re

import pytest
from playwright.sync_api import expect

from clinometer.messages import say, sentences
from tests.view.browser import stage
from tests.view.browser.conftest import settled

WEIGHT = "layers.0.attn.q_proj.weight"


def unsaid(page, language):
    """Message keys, or places of sentences, that show where words should stand."""
    text = page.locator("body").inner_text()
    assert not re.search(r"\bpage\.[a-z_]+\b", text)
    places = {
        f"{{{name}}}" for line in sentences(language).values() for name in re.findall(r"\{(\w+)\}", line)
    }
    assert [place for place in places if place in text] == []


def fits(page):
    """Nothing sticks out to the side."""
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.mark.parametrize(("language", "theme", "width"), [("en", "light", 1440), ("zh", "dark", 390)])
def test_every_page_is_a_click_away(open_page, server, language, theme, width):
    watched = open_page(server, f"lang={language}&theme={theme}", width=width)
    page = watched.page
    word = lambda key: say(f"page.{key}", language)  # noqa: E731

    def look(name):
        settled(page)
        assert f"lang={language}" in page.url
        assert page.locator("html").get_attribute("data-theme") == theme
        unsaid(page, language)
        fits(page)
        assert (name == "runs") == ("run=" not in page.url)

    expect(page.locator("tr[data-run]")).to_have_count(4)
    look("runs")

    page.get_by_role("link", name="trained", exact=True).click()
    expect(page.locator("h1")).to_have_text("trained")
    settled(page)
    expect(page.locator(".strip-number[data-number=loss] .strip-value")).to_contain_text(re.compile(r"\d"))
    expect(page.locator("[data-chart=loss] .main-svg").first).to_be_visible()
    expect(page.locator(".map-canvas")).to_be_visible(visible=width > 720)
    look("run")

    page.locator(f".tree-leaf[title^='{WEIGHT} ']").click()
    expect(page.locator("h1")).to_have_text(WEIGHT)
    page.locator(".matrix-canvas").wait_for()
    for kind in ("weight", "update", "exp_avg", "exp_avg_sq", "grad"):
        page.locator(f".tensor-matrix [data-kind={kind}]").click()
        expect(page.locator(f".tensor-matrix [data-kind={kind}]")).to_have_attribute("aria-pressed", "true")
    look("tensor")

    page.locator(".index-box").fill("3, 5")
    page.locator(".index-box").press("Enter")
    expect(page.locator("h1")).to_have_text(f"{WEIGHT}[3, 5]")
    page.locator(".token").first.wait_for()
    expect(page.locator(".strongest tr")).to_have_count(10)
    expect(page.locator(".anatomy pre")).to_contain_text("√v")
    assert (
        page.locator(".token").evaluate_all("all => all.filter((one) => one.style.backgroundColor).length")
        > 5
    )
    look("weight")

    page.locator(".strongest a").first.click()
    page.locator(".token.chosen").wait_for()
    look("batch")
    expect(page.locator("main")).to_contain_text(word("exact"))
    plain = page.locator(".token").first.evaluate("one => one.style.backgroundColor")
    page.locator(".page-batch [data-kind=grad]").click()
    expect(page.locator(".page-batch .caption").last).to_have_text(word("by_grad_line"))
    assert page.locator(".token").first.evaluate("one => one.style.backgroundColor") != plain

    for kind, title in (("check", "checks"), ("diagnosis", "diagnoses")):
        page.locator(".subpages").get_by_role("link", name=word(title), exact=True).click()
        expect(page.locator(".notice strong")).to_have_text(word(f"no_{title}"))
        look(kind)

    page.locator(".crumbs a").first.click()
    expect(page.locator(".runs input[type=checkbox]")).to_have_count(4)
    for box in page.locator(".runs input[type=checkbox]").all()[:3]:
        box.check()
    page.get_by_role("button", name=say("page.compare_n", language, n=3)).click()
    expect(page.locator(".page-compare [data-chart=compare-loss] .main-svg").first).to_be_visible()
    expect(page.locator(".page-compare [data-chart=compare-loss] .legend-row")).to_have_count(3)
    settled(page)
    unsaid(page, language)
    fits(page)


def test_language_and_theme_are_switched_and_remembered(open_page, server):
    watched = open_page(server, f"run={server.ids['long']}")
    page = watched.page
    expect(page.locator("[data-chart=loss] h2")).to_contain_text("Loss")
    page.locator("[data-tool=language]").click()
    expect(page.locator("[data-chart=loss] h2")).to_contain_text("损失")
    assert "lang=zh" in page.url
    settled(page)
    page.locator("[data-tool=theme]").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    assert "theme=dark" in page.url
    settled(page)
    page.goto(server.url())  # an address that says nothing: what was chosen last holds
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")


def test_names_that_are_markup_are_text_everywhere(open_page, server):
    run = server.ids["hostile"]
    watched = open_page(server, "")
    page = watched.page
    expect(page.locator("main")).to_contain_text(stage.HOSTILE_RUN)
    for query in (f"run={run}", f"run={run}&page=diagnosis", f"run={run}&page=check",
                  f"page=compare&runs={run},{server.ids['trained']}"):  # fmt: skip
        page.goto(server.url(query))
        settled(page)
        expect(page.locator("body")).to_contain_text("<")
        assert page.locator("main img, main b[onclick], main u, main script").count() == 0
    page.goto(server.url(f"run={run}"))
    settled(page)
    page.locator(".tree-leaf", has_text="hacked").click()
    expect(page.locator("h1")).to_have_text(stage.HOSTILE)
    settled(page)
    assert page.locator("main img").count() == 0


def test_reports_are_read_and_their_tensors_are_links(open_page, server):
    run = server.ids["hostile"]
    watched = open_page(server, f"run={run}&page=diagnosis")
    page = watched.page
    expect(page.locator(".report-text")).to_contain_text("h = h.detach() <script>")
    page.locator(".report summary").first.click()
    expect(page.locator(".document").first).to_contain_text("findings")
    page.locator(".report-text a", has_text="embed.weight").click()
    expect(page.locator("h1")).to_have_text("embed.weight")


def test_a_run_that_died_says_since_when(open_page, server):
    page = open_page(server, f"run={server.ids['crashed']}").page
    notice = page.locator(".notice.alarm")
    expect(notice).to_contain_text("This run ended without recording its end")
    expect(notice).to_contain_text(re.compile(r"written since .+ ago.+last recorded step is 40"))


def test_what_is_not_there_is_said(open_page, server):
    watched = open_page(server, "run=000000000000", wait=False)
    watched.allowed = ("404", "ERR_FAILED")
    page = watched.page
    expect(page.locator(".notice.alarm")).to_contain_text("This could not be shown")
    run = server.ids["trained"]
    for query, words in (
        (f"run={run}&page=tensor&tensor=<b>nothing</b>", "<b>nothing</b> is not among its"),
        (f"run={run}&page=weight&tensor={WEIGHT}&index=99,0", "is not an entry of"),
        (f"run={run}&page=nowhere", "There is no such page"),
        ("page=compare&runs=x", "A comparison needs two runs"),
    ):
        page.goto(server.url(query))
        expect(page.locator("main .notice")).to_contain_text(words)
    page.goto(server.url(f"run={run}"))
    settled(page)
    page.route("**/api/runs/**", lambda route: route.abort())
    page.locator(".tree-leaf").first.click()
    expect(page.locator(".notice.alarm")).to_contain_text("The server does not answer")
    page.unroute("**/api/runs/**")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("h1")).to_have_text("token_embeddings.weight")
    settled(page)
