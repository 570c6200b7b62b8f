"""The microscope's server: a Starlette application on uvicorn."""

from __future__ import annotations

import errno
import socket
import sys
import threading
import traceback
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from clinometer.messages import LANGUAGES, InputError, current_language
from clinometer.view.errors import ApiError, body_of
from clinometer.view.http import api_runs
from clinometer.view.http.answers import json_answer
from clinometer.view.http.calls import make_pool
from clinometer.view.http.openapi import all_routes
from clinometer.view.http.safety import Guard, hosts_for, is_loopback
from clinometer.view.http.static_files import Pages
from clinometer.view.http.timeouts import Patience
from clinometer.view.jobs import Replays
from clinometer.view.library import Library
from clinometer.view.live import Live

PORT = 8713
TRIED_PORTS = 20


def make_app(
    root: Path,
    *,
    token: str | None = None,
    allowed_hosts: Iterable[str] = (),
    host: str = "127.0.0.1",
    language: str | None = None,
) -> Starlette:
    """The application for the runs at or under `root`; it reads, and writes nothing.

    `allowed_hosts` are further names (with their port where it differs) that may stand in the Host header.
    """
    language = language or current_language()
    library = Library(root)
    replays = Replays()
    pool = make_pool()
    live = Live(lambda wanted: api_runs.states(library, wanted))
    pages = Pages(language)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await live.close()
        await run_in_threadpool(replays.close)
        await run_in_threadpool(pool.shutdown)
        library.close()

    routes = [
        Route("/", pages.page),
        Route("/static/{hash}/{name:path}", pages.file),
        *(route.served() for route in all_routes()),
    ]

    def answer_error(request: Request, error: Exception) -> Response:
        given = request.query_params.get("lang", "")
        said = given if given in LANGUAGES else language
        if isinstance(error, ApiError):
            return json_answer(request, error.body(said), error.status)
        if isinstance(error, InputError):
            return json_answer(request, body_of(error, said), 422)
        status = error.status_code if isinstance(error, HTTPException) else 500
        if status == 500:
            traceback.print_exception(error, file=sys.stderr)
        key = {404: "view.no_page", 405: "view.no_method"}.get(status, "view.failed")
        return json_answer(request, ApiError(status, key).body(said), status)

    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers=dict.fromkeys((ApiError, InputError, HTTPException), answer_error),
    )
    app.state.library = library
    app.state.replays = replays
    app.state.live = live
    app.state.pages = pages
    app.state.pool = pool
    app.state.language = language
    app.add_middleware(Guard, hosts=hosts_for(host, allowed_hosts), token=token, language=language)
    return app


class _Server(uvicorn.Server):
    """Ends the live streams before it waits for connections: an open page must not delay Ctrl-C."""

    def __init__(self, config: uvicorn.Config, live: Live) -> None:
        super().__init__(config)
        self._live = live

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._live.close()
        await super().shutdown(sockets)


def serve(
    root: Path,
    host: str = "127.0.0.1",
    port: int | None = None,
    *,
    token: str | None = None,
    allowed_hosts: Iterable[str] = (),
    open_browser: bool = True,
    language: str | None = None,
    announce: Callable[[str], None] = print,
    path: str = "/",
) -> None:
    """Serve until Ctrl-C. `port` None takes 8713 or the next free one; `announce` gets each address.

    Raises `InputError` for a port in use, for an address of another machine, and for a public address
    without a token.
    """
    if token is None and not is_loopback(host):
        raise InputError("view.token_needed", host=host)
    listener = _listen(host, port)
    port = listener.getsockname()[1]
    app = make_app(root, token=token, allowed_hosts=allowed_hosts, host=host, language=language)
    if token is not None:
        path += f"{'&' if '?' in path else '?'}token={quote(token, safe='')}"
    addresses = [f"http://{name}:{port}{path}" for name in _names(host)]
    server = _Server(settings(app), app.state.live)
    for address in addresses:
        announce(address)
    if open_browser:
        threading.Timer(0.3, webbrowser.open, (addresses[0],)).start()
    try:
        with suppress(KeyboardInterrupt):  # ends the server
            server.run(sockets=[listener])
    finally:
        listener.close()


def settings(app: Starlette) -> uvicorn.Config:
    """The settings of uvicorn, with limits for every client."""
    return uvicorn.Config(
        app,
        http=Patience,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=128,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=32_768,
        proxy_headers=False,
    )


def _names(host: str) -> list[str]:
    """What to call a server bound to `host`: from this machine, and, bound to all addresses, from others."""
    if host in ("0.0.0.0", "::", ""):
        return ["[::1]" if host == "::" else "127.0.0.1", socket.gethostname().lower()]
    return [f"[{host}]" if ":" in host else host]


def _listen(host: str, port: int | None) -> socket.socket:
    """A listening socket: on `port`, or on 8713 or the next free one."""
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", 0, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise InputError("view.no_address", host=host) from None
    family, address = found[0], found[4][0]
    for tried in range(PORT, PORT + TRIED_PORTS) if port is None else (port,):
        listener = socket.socket(family, socket.SOCK_STREAM)
        if sys.platform != "win32":  # there it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, tried))
            listener.listen(128)
            return listener
        except OverflowError:
            listener.close()
            raise InputError("view.no_port", port=tried) from None
        except OSError as error:
            listener.close()
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise InputError("view.no_address", host=host) from None
            if port is not None or error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise InputError("view.port", port=tried, reason=error.strerror) from None
    raise InputError("view.no_free_port", first=PORT, last=PORT + TRIED_PORTS - 1)
