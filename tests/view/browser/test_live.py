"""A run that is written while it is watched; none, one and twenty runs; and a long one."""

import re
import threading
import time
from itertools import pairwise

import pytest
from playwright.sync_api import expect

from tests.record.synthetic import synthetic
from tests.view.browser import stage
from tests.view.browser.conftest import serve, settled


class Writer:
    """Takes a step every few hundredths of a second until it is stopped."""

    def __init__(self, run: stage.Written) -> None:
        self.run = run
        self.go = threading.Event()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._write, daemon=True)
        self.thread.start()

    def _write(self) -> None:
        while not self.over.is_set():
            if self.go.is_set():
                self.run.step()
            time.sleep(0.05)

    def stop(self) -> None:
        self.over.set()
        self.thread.join()


@pytest.fixture
def live(tmp_path):
    run = stage.Written(tmp_path / "live", name="live")
    for _ in range(30):
        run.step()
    writer = Writer(run)
    for server in serve(tmp_path):
        yield writer, server
    writer.stop()
    run.close()


def shown_step(page) -> int:
    found = re.search(r"step ([\d,]+)", page.locator(".run-head").inner_text())
    return int(found[1].replace(",", ""))


def test_a_live_run_moves_by_itself_at_most_once_a_second_and_not_while_hidden(live, open_page):
    writer, server = live
    page = open_page(server).page
    page.get_by_role("link", name="live").click()
    settled(page)
    expect(page.locator(".state.live")).to_be_visible()
    assert shown_step(page) == 30
    asked = []
    page.on("request", lambda request: "/strip" in request.url and asked.append(time.monotonic()))
    writer.go.set()
    expect(page.locator(".run-head")).not_to_contain_text("step 30")
    first = shown_step(page)
    asked.clear()
    page.wait_for_timeout(3000)
    assert shown_step(page) > first
    gaps = [later - sooner for sooner, later in pairwise(asked)]
    assert asked
    assert all(gap > 0.9 for gap in gaps), gaps

    # The statistic's list stays as it is, though the page moves on beneath it.
    page.locator(".map-choice select").evaluate("one => { one.mark = 1 }")
    page.evaluate(
        "Object.defineProperty(document, 'hidden', { value: true, configurable: true });"
        " document.dispatchEvent(new Event('visibilitychange'))"
    )
    page.wait_for_timeout(1500)  # what was under way may end
    asked.clear()
    hidden = shown_step(page)
    page.wait_for_timeout(2000)
    assert asked == []
    assert shown_step(page) == hidden
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator(".run-head")).not_to_contain_text(f"step {hidden:,} ")
    assert page.locator(".map-choice select").evaluate("one => one.mark") == 1


def test_the_list_of_runs_is_live_and_a_click_survives_it(live, open_page):
    writer, server = live
    page = open_page(server).page
    row = page.locator("tr[data-run]")
    row.evaluate("one => { one.mark = 1 }")
    steps = row.locator("[data-cell=steps]")
    expect(steps).to_have_text("30")
    writer.go.set()
    expect(steps).not_to_have_text("30")
    assert row.evaluate("one => one.mark") == 1


def test_no_run_says_what_to_type_and_the_first_appears_by_itself(open_page, tmp_path):
    for server in serve(tmp_path):
        page = open_page(server, "lang=en").page
        expect(page.locator("main")).to_contain_text("clinometer train --run runs/first")
        expect(page.locator("main")).to_contain_text("clinometer.watch(model, optimizer")
        page.locator("[data-tool=language]").click()
        expect(page.locator(".first-steps h1")).to_have_text("还没有运行")
        stage.written(tmp_path / "first", 5, name="first")
        expect(page.locator("tr[data-run]")).to_have_count(1)
        page.goto("about:blank")


def test_one_run(open_page, tmp_path):
    stage.written(tmp_path / "alone", 20, name="alone")
    for server in serve(tmp_path):
        page = open_page(server).page
        expect(page.locator("tr[data-run]")).to_have_count(1)
        expect(page.locator(".runs-bar button")).to_be_hidden()
        page.keyboard.press("j")
        page.keyboard.press("Enter")
        expect(page.locator("h1")).to_have_text("alone")
        settled(page)
        page.goto("about:blank")


def test_twenty_runs_are_filtered_and_compared(open_page, tmp_path):
    for number in range(20):
        config = {"optim": {"lr": 1e-3 * (1 + number)}}
        stage.written(
            tmp_path / f"run-{number:02d}", 12, name=f"run-{number:02d}", seed=number, config=config
        )
    for server in serve(tmp_path):
        page = open_page(server).page
        expect(page.locator("tr[data-run]")).to_have_count(20)
        page.keyboard.press("/")
        page.keyboard.type("run-1")
        expect(page.locator("tr[data-run]")).to_have_count(10)
        assert "filter=run-1" in page.url
        for box in page.locator(".runs input[type=checkbox]").all():
            box.check()
        page.get_by_role("button", name="Compare 10 runs").click()
        expect(page.locator("[data-chart=compare-loss] .legend-row")).to_have_count(10)
        expect(page.locator(".compare-table")).to_contain_text("optim.lr")
        settled(page)
        page.goto("about:blank")


def test_a_run_without_a_step_fills_by_itself(open_page, tmp_path):
    run = stage.Written(tmp_path / "begun", name="begun")
    for server in serve(tmp_path):
        page = open_page(server).page
        page.get_by_role("link", name="begun").click()
        expect(page.locator(".notice")).to_contain_text("no step yet")
        for _ in range(5):
            run.step()
        expect(page.locator("[data-chart=loss] .main-svg").first).to_be_visible()
        settled(page)
        page.goto("about:blank")
    run.close()


def drawn_colours(page) -> int:
    """How many colours stand in the middle column of the map."""
    return page.locator(".map-canvas").evaluate(
        """canvas => {
            const middle = Math.floor(canvas.width / 2);
            const { data } = canvas.getContext("2d").getImageData(middle, 0, 1, canvas.height);
            const seen = new Set();
            for (let k = 0; k < data.length; k += 4) if (data[k + 3]) seen.add(data.slice(k, k + 3).join());
            return seen.size;
        }"""
    )


def look_at_a_long_run(open_page, server, run, tensors, slowest):
    watched = open_page(server, f"run={run}")
    page = watched.page
    assert drawn_colours(page) > tensors / 8
    expect(page.locator(".tree > header")).to_contain_text(str(tensors))
    assert page.locator(".tree-leaf").count() < 120
    expect(page.locator(".alert-tick")).to_have_count(2)
    page.keyboard.press("/")
    page.keyboard.type(r"/layers.3\./ q_proj")
    expect(page.locator(".tree-leaf")).to_have_count(1)
    page.keyboard.press("Escape")
    begin = time.monotonic()
    page.keyboard.press("+")
    expect(page.locator(".zoomed")).to_contain_text("Showing steps")
    page.wait_for_load_state("networkidle")
    assert time.monotonic() - begin < slowest
    page.locator(".tree-leaf").nth(5).click()
    settled(page)
    expect(page.locator("[data-chart^=ridge] .main-svg").first).to_be_visible()


def test_a_run_of_4000_steps_and_86_tensors(open_page, server):
    look_at_a_long_run(open_page, server, server.ids["long"], 86, 20)


@pytest.fixture
def big(tmp_path):
    synthetic(tmp_path / "big", steps=100_000, layers=42, name="big")
    yield from serve(tmp_path)


@pytest.mark.soak
def test_a_run_of_100_000_steps_and_296_tensors(big, open_page):
    run = open_page(big).page.locator("tr[data-run]").get_attribute("data-run")
    look_at_a_long_run(open_page, big, run, 296, 5)
