"""What hands do: keys, zoom, the map, the matrix, replays, files taken home."""

import csv
import io
import json
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import expect

from clinometer.messages import say
from tests.view.browser import stage
from tests.view.browser.conftest import PATIENCE, serve, settled

WEIGHT = "layers.0.attn.q_proj.weight"


def test_the_keyboard_reaches_everything(open_page, server):
    page = open_page(server).page
    names = page.locator(".run-name").all_inner_texts()
    page.keyboard.press("j")
    expect(page.locator(":focus")).to_have_text(names[0])
    page.keyboard.press("j")
    expect(page.locator(":focus")).to_have_text(names[1])
    page.keyboard.press("k")
    page.keyboard.press("/")
    page.keyboard.type("long")
    expect(page.locator("tr[data-run]")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("long")
    settled(page)

    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.locator("h1")).to_have_text("long")

    page.keyboard.press("/")
    page.keyboard.type("layers.7 v_proj")
    expect(page.locator(".tree-leaf")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator("[data-filter]")).to_have_value("")
    page.keyboard.press("j")
    page.keyboard.press("j")
    expect(page.locator(":focus")).to_have_class(re.compile("tree-group"))
    page.keyboard.press("ArrowLeft")
    expect(page.locator(":focus")).to_have_attribute("aria-expanded", "false")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("j")
    expect(page.locator(":focus")).to_contain_text("attn.q_proj")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text(WEIGHT)
    settled(page)
    page.keyboard.press("j")
    expect(page.locator("h1")).to_have_text("layers.0.attn.k_proj.weight")
    page.keyboard.press("Escape")
    expect(page.locator("h1")).to_have_text("long")
    settled(page)

    page.keyboard.press("+")
    expect(page.locator(".zoomed")).to_contain_text("of 4,000")
    assert "from=" in page.url
    page.keyboard.press("Escape")  # first out of the zoom
    expect(page.locator(".zoomed")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(page.locator("h1")).to_have_text("Runs")

    page.keyboard.press("l")
    expect(page.locator("h1")).to_have_text("运行")
    page.keyboard.press("d")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")


def test_focus_is_seen(open_page, server):
    page = open_page(server, f"run={server.ids['trained']}").page
    for _ in range(12):
        page.keyboard.press("Tab")
        style = page.evaluate(
            "(() => { const s = getComputedStyle(document.activeElement);"
            " return [s.outlineStyle, s.outlineWidth] })()"
        )
        assert style == ["solid", "2px"], page.evaluate("document.activeElement.outerHTML.slice(0, 200)")


def drag(page, locator, a, b, y=0.5):
    box = locator.bounding_box()
    page.mouse.move(box["x"] + a * box["width"], box["y"] + y * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + (a + b) / 2 * box["width"], box["y"] + y * box["height"])
    page.mouse.move(box["x"] + b * box["width"], box["y"] + y * box["height"])
    page.mouse.up()


def test_a_zoom_on_one_time_axis_is_a_zoom_on_all(open_page, server):
    page = open_page(server, f"run={server.ids['long']}").page
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    drag(page, page.locator("[data-chart=loss] .chart-body"), 0.4, 0.6)
    expect(page.locator(".zoomed")).to_contain_text("Showing steps")
    page.wait_for_load_state("networkidle")
    found = re.search(r"from=(\d+)&to=(\d+)", page.url)
    low, high = int(found[1]), int(found[2])
    assert 500 < low < high < 3500
    for what in ("map", "figure/loss", "figure/norm", "figure/lr", "figure/speed"):
        assert any(f"/{what}?" in url and f"from={low}" in url and f"to={high}" in url for url in asked), what
    page.locator(".map-canvas").hover(position={"x": 600, "y": 100})
    hairs = [
        page.locator(f"[data-chart={name}] .hair").evaluate("one => one.getBoundingClientRect().left")
        for name in ("loss", "map", "norm", "lr", "speed")
    ]
    assert max(hairs) - min(hairs) < 0.01  # they stand under each other to the pixel
    page.go_back()
    expect(page.locator(".zoomed")).to_be_hidden()


def test_the_map_tells_and_opens(open_page, server):
    page = open_page(server, f"run={server.ids['hostile']}").page
    canvas = page.locator(".map-canvas")
    box = canvas.bounding_box()
    canvas.hover(position={"x": box["width"] / 2, "y": 5})
    expect(page.locator(".tip")).to_contain_text(re.compile(r"embed\.weight.*step \d+ · .+ rank \d+ of 8"))
    canvas.focus()
    for _ in range(7):
        page.keyboard.press("ArrowDown")
    expect(page.locator(".tip")).to_contain_text("head.weight")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("head.weight")
    settled(page)
    page.go_back()
    settled(page)
    page.locator(".alert-tick.fault").click()
    expect(page.locator("li:focus")).to_contain_text("head.weight")
    page.locator(".map-choice select").select_option("update_ratio")
    expect(page.locator("[data-chart=map] .unit")).to_contain_text(re.compile("update", re.I))
    assert "stat=update_ratio" in page.url


def test_the_matrix_goes_down_to_single_entries(open_page, server):
    page = open_page(
        server, f"run={server.ids['trained']}&page=tensor&tensor=token_embeddings.weight&step=9"
    ).page
    canvas = page.locator(".matrix-canvas")
    canvas.wait_for()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 100, box["y"] + 45)
    page.mouse.move(box["x"] + 120, box["y"] + 60)
    page.mouse.up()
    expect(page.locator(".matrix")).to_contain_text("one cell is one entry")
    found = re.search(r"rows=(\d+),(\d+)&cols=(\d+),(\d+)", page.url)
    assert int(found[2]) - int(found[1]) < 40
    canvas.wait_for()
    canvas.hover(position={"x": 10, "y": 5})
    expect(page.locator(".matrix-read")).to_contain_text(f"[{found[1]}, {found[3]}]")
    canvas.click(position={"x": 10, "y": 5})
    expect(page.locator("h1")).to_have_text(f"token_embeddings.weight[{found[1]}, {found[3]}]")
    settled(page)


@pytest.fixture
def own_copy(runs, server, tmp_path):
    """The trained run again, so that what is replayed in it is not there for other tests."""
    shutil.copytree(runs / "trained", tmp_path / "again")
    for one in serve(tmp_path):
        one.ids["again"] = server.ids["trained"]
        yield one


def test_a_step_is_replayed_with_progress_and_can_be_cancelled(own_copy, open_page):
    page = open_page(own_copy, f"run={own_copy.ids['again']}&page=batch&step=12").page
    page.get_by_role("button", name="Replay step 12").click()
    expect(page.locator(".replay progress")).to_be_visible()
    page.locator("[data-cancel]").click()
    expect(page.get_by_role("button", name="Replay step 12")).to_be_visible()
    page.get_by_role("button", name="Replay step 12").click()
    page.locator(".token").first.wait_for(timeout=PATIENCE)
    expect(page.locator("main")).to_contain_text("the same to the bit")
    expect(page.locator(".step-chooser")).to_contain_text("replayed")


@pytest.mark.parametrize(("language", "width"), [("en", 1440), ("zh", 390)])
def test_a_token_tells_the_tensors_it_moved_most_and_each_is_a_link(open_page, server, language, width):
    query = f"run={server.ids['trained']}&page=batch&step=9&lang={language}"
    page = open_page(server, query, width=width).page
    moved = page.locator(".moved")
    expect(moved).to_have_text(say("page.moved_hint", language))
    page.locator(".token[data-at='1:20']").click()
    expect(moved.locator("tbody tr")).to_have_count(10)
    place = say("page.moved_unit", language, sequence=1, position=20)
    expect(moved.locator("h2")).to_have_text(f"{say('page.moved', language)} {place}")
    assert "token=1:20" in page.url or "token=1%3A20" in page.url
    expect(moved).to_be_in_viewport()
    # By keys alone: along the text, into the token, on to the first tensor, and to its page.
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(moved.locator("h2")).to_contain_text(say("page.moved_unit", language, sequence=1, position=21))
    page.reload()
    settled(page)
    expect(moved.locator("tbody tr")).to_have_count(10)
    page.locator(".tokens").focus()
    first = moved.locator("tbody a").first
    for _ in range(12):  # past the pager
        page.keyboard.press("Tab")
        if first.evaluate("one => one === document.activeElement"):
            break
    name = first.inner_text()
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text(name)
    settled(page)


def test_a_replay_of_an_earlier_version_is_made_again_for_its_tokens(own_copy, open_page):
    path = own_copy.root / "again" / "replays" / "step-00000009"
    told = json.loads((path / "step.json").read_text())
    del told["files"]["tokens.safetensors"]
    (path / "step.json").write_text(json.dumps(told))
    (path / "tokens.safetensors").unlink()
    page = open_page(own_copy, f"run={own_copy.ids['again']}&page=batch&step=9").page
    page.locator(".token[data-at='0:3']").click()
    expect(page.locator(".moved")).to_contain_text("Replay this step again to see this.")
    page.locator(".moved").get_by_role("button", name="Replay step 9").click()
    page.locator(".moved tbody tr").first.wait_for(timeout=PATIENCE)
    expect(page.locator(".moved tbody tr")).to_have_count(10)


@pytest.fixture
def broken(tmp_path):
    """A run whose loss is NaN from step 60 on, with three alerts."""
    run = stage.Written(tmp_path / "broken", name="broken")
    record = run.recorder.step

    def spoilt(step, when, scalars, rows):
        record(step, when, scalars | ({"loss": float("nan")} if step >= 60 else {}), rows)

    run.recorder.step = spoilt
    for _ in range(90):
        run.step()
    run.alerts()
    run.close()
    yield from serve(tmp_path)


def test_what_is_not_finite_is_said_with_its_step_and_alerts_are_read_at_their_tick(broken, open_page):
    page = open_page(broken).page
    expect(page.locator("[data-cell=loss]")).to_have_text("not finite (step 60)")
    page.locator(".run-name").click()
    settled(page)
    expect(page.locator("[data-number=loss] .strip-value")).to_have_text("not finite (first at step 60)")
    expect(page.locator("[data-number=norm] .strip-value")).to_have_text(re.compile(r"^\d"))
    ticks = page.locator(".alert-tick")
    expect(ticks).to_have_count(3)
    seen = ""
    for tick in ticks.all():
        tick.click()
        expect(page.locator(".alert-told li:focus")).to_be_in_viewport()
        seen += page.locator(".alert-told").inner_text()
    for words in ("head.weight", "diagnose(model, closure)", "blocks.0.norm.weight", "clip_grad_norm_"):
        assert words in seen
    page.locator(".alert-told").get_by_role("button", name="Close").click()
    expect(page.locator(".alert-told")).to_be_hidden()


def test_no_line_of_a_weights_anatomy_is_cut(open_page, server):
    query = f"run={server.ids['trained']}&page=weight&tensor={WEIGHT}&step=9&index=3,5"
    for width in (1440, 1200, 390):
        page = open_page(server, query, width=width).page
        page.locator(".anatomy pre").wait_for()
        assert page.locator(".anatomy pre").evaluate("one => one.scrollWidth - one.clientWidth") <= 0
        expect(page.locator(".anatomy pre")).to_contain_text("√v")


def saved(page, chart, kind):
    page.locator(f"[data-chart={chart}]").hover()
    with page.expect_download() as waiting:
        page.locator(f"[data-chart={chart}]").get_by_role("button", name=kind, exact=True).click()
    return Path(waiting.value.path()).read_bytes()


def test_charts_are_taken_home_as_png_svg_and_csv(open_page, server):
    page = open_page(server, f"run={server.ids['hostile']}").page
    for chart in ("loss", "map"):
        assert saved(page, chart, "PNG").startswith(b"\x89PNG")
        drawing = saved(page, chart, "SVG").decode()
        assert drawing.startswith("<svg")
        assert "<img" not in drawing
        rows = list(csv.reader(io.StringIO(saved(page, chart, "CSV").decode())))
        assert len(rows) > 8
        if chart == "map":
            assert [row[0] for row in rows[1:]] == [name for name, _ in stage.SMALL]
            assert len(rows[0]) == 121


def test_a_phone_gets_rows_with_lines_instead_of_the_map(open_page, server):
    page = open_page(server, f"run={server.ids['long']}", width=390, height=844).page
    expect(page.locator(".map-canvas")).to_be_hidden()
    leaf = page.locator(".tree-leaf").first
    leaf.scroll_into_view_if_needed()
    expect(leaf).to_be_visible()
    assert leaf.locator("canvas").bounding_box()["width"] > 90
    assert leaf.bounding_box()["height"] >= 40
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_most_strongly_tinted_token_can_be_read(open_page, server):
    query = f"run={server.ids['trained']}&page=weight&tensor={WEIGHT}&step=9&index=3,5"
    for theme in ("light", "dark"):
        page = open_page(server, query, theme=theme).page
        page.locator(".token").first.wait_for()
        ratios = page.locator(".token").evaluate_all(
            """all => {
                const light = (text) => {
                    const [r, g, b] = text.match(/\\d+/g).slice(0, 3).map((v) => v / 255)
                        .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
                    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
                };
                return all.filter((one) => one.style.backgroundColor).map((one) => {
                    const [a, b] = [light(getComputedStyle(one).color), light(one.style.backgroundColor)];
                    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
                });
            }"""
        )
        assert len(ratios) > 20
        assert min(ratios) >= 4.5, (theme, min(ratios))
