"""`train --view`: the microscope in a process of its own beside the training."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clinometer.messages import say


@contextmanager
def page_process() -> Iterator[Callable[[Path], None]]:
    """Yields a function that opens the page of a run; at the end the page stays until Ctrl-C."""
    pages: list[subprocess.Popen[str]] = []

    def open_page(run: Path) -> None:
        command = [sys.executable, "-m", "clinometer", "view", str(run)]
        page = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        pages.append(page)
        assert page.stdout is not None
        for line in page.stdout:  # its address, before the training's own line begins to move
            print(line, end="", flush=True)
            if "http" in line:
                break
        threading.Thread(target=page.stdout.read, daemon=True).start()

    try:
        yield open_page
        if pages and pages[0].poll() is None:
            print(say("view.stop_with"), flush=True)
            with suppress(KeyboardInterrupt):  # the training is done: closing the page is not a failure
                pages[0].wait()
    finally:
        for page in pages:
            page.terminate()
            page.wait()
