"""`clinometer view`: serves the microscope until Ctrl-C."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from clinometer.messages import InputError, current_language, say
from clinometer.messages.folding import tell
from clinometer.record.read.reader import RunFile, find_runs


def view_command(
    console: Console,
    path: Path,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    token: str | None = None,
    allow_host: Sequence[str] = (),
    open_browser: bool = True,
) -> int:
    """Serve the runs at or under `path` until Ctrl-C; 0. `token` "auto" makes a random one."""
    from clinometer.view.http.server import serve

    if not os.path.isdir(path):
        raise InputError("view.missing", path=path)
    found = find_runs(path)
    if not found:  # they appear on the page as they are made
        tell(console, say("view.no_runs", path=path))
    if token == "auto":
        token = secrets.token_urlsafe(24)
    alone = RunFile.open(path) if found == [path] else None
    start = "/" if alone is None else f"/?run={alone.id}&page=run"
    if alone is not None:
        alone.close()

    def announce(address: str) -> None:
        tell(console, f"{say('view.open_at', address=address)}\n{say('view.stop_with')}")

    serve(
        path,
        host,
        port,
        token=token,
        allowed_hosts=allow_host,
        open_browser=open_browser,
        language=current_language(),
        announce=announce,
        path=start,
    )
    return 0
