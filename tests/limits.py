"""A limit for a whole run of tests: `pytest --run-limit SECONDS`.

A run that takes longer is interrupted, and its summary names every test that had begun and not ended. A test
that hangs on its own is ended earlier, by pytest-timeout, with its stack; a worker in which even that is not
possible, by faulthandler.
"""

from __future__ import annotations

import _thread
import signal
import threading
import time

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "interrupt the run after this many seconds and name the tests that are running"
    parser.addoption("--run-limit", type=float, default=0.0, metavar="SECONDS", help=help)


def pytest_configure(config: pytest.Config) -> None:
    limit = config.getoption("--run-limit")
    if limit and not hasattr(config, "workerinput"):  # pytest-xdist: the process that talks to the workers
        config.pluginmanager.register(RunLimit(limit), "run limit")


class RunLimit:
    def __init__(self, seconds: float) -> None:
        self._seconds, self._over = seconds, False
        self._began: dict[str, float] = {}
        self._running: list[str] = []
        self._timer = threading.Timer(seconds, self._interrupt)
        self._timer.daemon = True

    def _interrupt(self) -> None:
        self._over, now = True, time.monotonic()
        self._running = [f"{now - began:.0f} s: {test}" for test, began in self._began.items()]
        _thread.interrupt_main()

    def pytest_sessionstart(self) -> None:
        # A shell's background job begins with SIGINT ignored, and interrupt_main() then does nothing.
        self._handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        self._timer.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._began[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._began.pop(nodeid, None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when not in ("setup", "call", "teardown"):  # the worker died, and the test does not finish
            self._began.pop(report.nodeid, None)

    def pytest_sessionfinish(self) -> None:
        self._timer.cancel()
        signal.signal(signal.SIGINT, self._handler)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._over:
            return
        terminalreporter.section(f"the run took longer than {self._seconds:g} s", red=True, bold=True)
        for line in self._running or ["no test"]:
            terminalreporter.line(f"still running after {line}", red=True)
