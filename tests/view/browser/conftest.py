"""A server, a Chromium, and a page that keeps everything it should not have said."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import uvicorn

from clinometer.view.http.server import make_app
from tests.record.synthetic import synthetic
from tests.view.browser import stage

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 120_000
"""Milliseconds: two shared cores may be busy with other tests."""


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


def _chromium() -> str | None:
    given = os.environ.get("CLINOMETER_CHROMIUM")
    names = ("chromium", "chromium-browser", "google-chrome")
    return given or next((found for name in names if (found := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser():
    needed = os.environ.get("CLINOMETER_REQUIRE_BROWSER") == "1"
    missing = pytest.fail if needed else pytest.skip
    try:
        from playwright.sync_api import expect, sync_playwright
    except ImportError:
        missing("playwright is not installed")
    path = _chromium()
    if path is None:
        missing("no Chromium; set CLINOMETER_CHROMIUM to one")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS, timeout=PATIENCE)
        yield browser
        browser.close()


@dataclass
class Server:
    address: str
    root: Path
    ids: dict[str, str] = field(default_factory=dict)

    def url(self, query: str = "") -> str:
        return f"{self.address}/{'?' + query if query else ''}"


def serve(root: Path):
    """The page of the runs under `root`, from a thread of this process; stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(root, language="en"),
            host="127.0.0.1",
            port=port,
            log_level="error",
            timeout_graceful_shutdown=2,
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + PATIENCE / 1000
    while not server.started and time.monotonic() < end:
        time.sleep(0.02)
    assert server.started
    yield Server(f"http://127.0.0.1:{port}", root)
    server.should_exit = True
    thread.join(timeout=10)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    before = os.environ.get("CLINOMETER_CACHE")
    os.environ["CLINOMETER_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["CLINOMETER_CACHE"]
    else:
        os.environ["CLINOMETER_CACHE"] = before


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A run really trained and replayed, a hostile one, one that died, and one of 4,000 steps."""
    root = tmp_path_factory.mktemp("runs")
    stage.replayable(root / "trained")
    stage.written(root / "hostile", name=stage.HOSTILE_RUN)
    stage.written(root / "crashed", 40, state="crashed", name="crashed")
    synthetic(root / "long", steps=4000, layers=12, name="long")
    return root


@pytest.fixture(scope="session")
def server(runs):
    from clinometer.record.read.reader import RunFile

    for one in serve(runs):
        for folder in runs.iterdir():
            if (folder / "run.sqlite").exists():
                run = RunFile.open(folder)
                one.ids[folder.name] = run.id
                run.close()
        yield one


class Watched:
    """A browser page, and what it said that it should not have."""

    def __init__(self, context, host: str) -> None:
        self.context, self.host = context, host
        self.complaints: list[str] = []
        self.allowed: tuple[str, ...] = ()
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.add_init_script(
            "window.violations = []; addEventListener('securitypolicyviolation',"
            " (e) => violations.push(`${e.violatedDirective} ${e.blockedURI} ${e.sourceFile}`))"
        )
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("request", self._request)

    def _console(self, message) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def _request(self, request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.netloc != self.host:
            self.complaints.append(f"left the host: {request.url}")

    def verify(self) -> None:
        if not self.page.is_closed():
            self.complaints += [f"policy: {one}" for one in self.page.evaluate("window.violations ?? []")]
            assert self.page.evaluate("window.hacked") is None
        said = [one for one in self.complaints if not any(allowed in one for allowed in self.allowed)]
        assert said == []


@pytest.fixture
def open_page(browser):
    """open_page(server, query, width=…, theme=…, …) → Watched; verified when the test is over."""
    opened: list[Watched] = []

    def make(server, query="", *, width=1440, height=1000, theme="light", wait=True, **more) -> Watched:
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=theme, accept_downloads=True, **more
        )
        watched = Watched(context, urlsplit(server.address).netloc)
        opened.append(watched)
        watched.page.goto(server.url(query))
        if wait:
            settled(watched.page)
        return watched

    yield make
    try:
        for watched in opened:
            watched.verify()
    finally:
        for watched in opened:
            watched.context.close()


def settled(page) -> None:
    """Until every frame that stood for something to come is filled."""
    page.wait_for_selector("main > *")
    page.wait_for_selector(".skeleton", state="detached")
