"""How long the server waits for a slow client, and for how many at once.

uvicorn waits without end for a request that is not finished and for a reader that does not read, and once
its limit of connections is reached it answers nobody. Here a connection that keeps us waiting is closed
after some seconds, and when too many wait the one that has waited longest is closed, so that a new request
is answered.
"""

from __future__ import annotations

import asyncio
from typing import Any
from weakref import WeakKeyDictionary

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 10.0
"""For a request, head and body; also for the first one of a connection."""
READER_SECONDS = 30.0
"""For a client that does not read the answer."""
MOST_WAITING = 64
"""Connections that have no finished request under way."""

_waiting: WeakKeyDictionary[Any, dict[Patience, None]] = WeakKeyDictionary()
"""By server, the longest wait first."""


class Patience(H11Protocol):
    """uvicorn's protocol, for a server that every user of the machine can reach."""

    _request_timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        self._stop_reader_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_reader_timer()
        self._reader_timer = self.loop.call_later(READER_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_reader_timer()

    def _look(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle or self.conn.their_state is h11.SEND_BODY:
            if self not in self._others:
                self._wait()
        else:
            self._wait_no_more()

    @property
    def _others(self) -> dict[Patience, None]:
        return _waiting.setdefault(self.server_state, {})

    def _wait(self) -> None:
        """Count from now; of too many, close the one that waits longest."""
        others = self._others
        others[self] = None
        # An idle connection that has been answered is uvicorn's to close, after timeout_keep_alive.
        if self.cycle is None or self.conn.their_state is h11.SEND_BODY:
            self._request_timer = self.loop.call_later(REQUEST_SECONDS, self._give_up)
        if len(others) > MOST_WAITING:
            next(iter(others))._give_up()

    def _wait_no_more(self) -> None:
        self._others.pop(self, None)
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _give_up(self) -> None:
        self._wait_no_more()
        self.transport.abort()

    def _stop_reader_timer(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None
