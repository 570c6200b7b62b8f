"""Server-sent events: which runs have something new, at most once a second, only while a page listens."""

from __future__ import annotations

import asyncio
import json
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from clinometer.view.errors import ApiError

LISTENERS = 32
SECONDS = 1.0
BEAT_SECONDS = 15.0

State = dict[str, Any]


class Live:
    """`look(ids)` reads the states of the runs that are listened to; called in a thread, by one task."""

    def __init__(self, look: Callable[[set[str] | None], dict[str, State]]) -> None:
        self._look = look
        self._listeners: dict[asyncio.Event, str | None] = {}
        self._states: dict[str, State] = {}
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def answer(self, request: Request) -> Response:
        """The stream. A reader that is too slow gets the newest state when it is ready, never a backlog."""
        if len(self._listeners) >= LISTENERS or self._closed:
            raise ApiError(503, "view.crowded", limit=LISTENERS)
        return StreamingResponse(
            self._stream(request.query_params.get("run") or None),
            media_type="text/event-stream",
            headers={"cache-control": "no-store"},
        )

    async def close(self) -> None:
        """End every stream, so that the server can stop."""
        self._closed = True
        for event in self._listeners:
            event.set()
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _stream(self, run: str | None) -> AsyncIterator[bytes]:
        event = asyncio.Event()
        self._listeners[event] = run
        told: dict[str, State] = {}
        try:
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._poll())
            else:
                event.set()
            yield b"retry: 2000\n\n"
            while not self._closed:
                try:
                    await asyncio.wait_for(event.wait(), BEAT_SECONDS)
                except TimeoutError:
                    yield b": beat\n\n"
                    continue
                event.clear()
                for identity, state in list(self._states.items()):
                    if run in (None, identity) and told.get(identity) != state:
                        told[identity] = state
                        yield b"data: " + json.dumps(state).encode() + b"\n\n"
        finally:
            del self._listeners[event]

    async def _poll(self) -> None:
        while self._listeners:
            wanted = None if None in self._listeners.values() else {r for r in self._listeners.values() if r}
            try:
                states = await run_in_threadpool(self._look, wanted)
            except Exception:  # what cannot be read now may be readable in a second
                traceback.print_exc(file=sys.stderr)
                states = self._states
            if states != self._states:
                self._states = {**self._states, **states} if wanted is not None else states
                for event in self._listeners:
                    event.set()
            await asyncio.sleep(SECONDS)
