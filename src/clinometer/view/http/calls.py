"""A route of the API: its registration, and how it answers, in one of a few reading threads.

Errors become sentences; a versioned answer carries an ETag of the run's version.
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from clinometer.messages import InputError
from clinometer.record.read.reader import RunFile
from clinometer.view.errors import ApiError, body_of
from clinometer.view.http.answers import etag, json_answer, not_modified
from clinometer.view.http.query import Query
from clinometer.view.library import Library

READERS = 4
RUN = "/api/runs/{id}"

Handler = TypeVar("Handler", bound=Callable[..., Any])


@dataclass
class RouteCall:
    """One request to the API, in a reading thread."""

    request: Request
    query: Query
    library: Library

    @property
    def language(self) -> str:
        return self.query.language

    def run(self) -> RunFile:
        """The run of the URL."""
        return self.library.open(self.request.path_params["id"])

    def tensor(self, run: RunFile, name: str = "tensor") -> dict[str, Any]:
        """The tensor that the query names."""
        wanted = self.query.text(name)
        for tensor in run.tensors():
            if tensor["name"] == wanted:
                return tensor
        raise ApiError(404, "view.no_tensor", tensor=wanted[:200])

    def index(self, shape: list[int], name: str = "index") -> tuple[int, ...]:
        """An entry's place, inside `shape`."""
        index = tuple(self.query.wholes(name, 16))
        if len(index) != len(shape) or any(i >= size for i, size in zip(index, shape, strict=True)):
            raise ApiError(400, "view.index", index=list(index), shape=list(shape))
        return index


def make_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READERS, thread_name_prefix="clinometer-read")


@dataclass(frozen=True, kw_only=True)
class ApiRoute:
    """One operation of the API: what the server answers and what the OpenAPI document says come from here."""

    path: str
    summary: str
    handler: Callable[..., Any]
    query: tuple[str, ...]
    method: str
    versioned: bool | Callable[[Request], bool]
    content: str
    body: Mapping[str, Any] | None
    raw: bool

    def served(self) -> Route:
        """The route for Starlette."""
        return Route(self.path, self.handler if self.raw else self._endpoint, methods=[self.method.upper()])

    async def _endpoint(self, request: Request) -> Response:
        pool: ThreadPoolExecutor = request.app.state.pool
        return await asyncio.get_running_loop().run_in_executor(pool, self._answer, request)

    def _answer(self, request: Request) -> Response:
        query = Query(request.query_params, request.app.state.language)
        call = RouteCall(request, query, request.app.state.library)
        try:
            tag = None
            if self.versioned(request) if callable(self.versioned) else self.versioned:
                tag = etag(version_of(call.run()), request.url.path, request.url.query, query.language)
                if (known := not_modified(request, tag)) is not None:
                    return known
            data = self.handler(call)
            return data if isinstance(data, Response) else json_answer(request, data, tag=tag)
        except ApiError as error:
            return json_answer(request, error.body(query.language), error.status)
        except InputError as error:
            return json_answer(request, body_of(error, query.language), 422)
        except Exception:
            # One broken run must not take the page down; the terminal of the server shows where it broke.
            traceback.print_exc(file=sys.stderr)
            return json_answer(request, ApiError(500, "view.failed").body(query.language), 500)


class Routes(list[ApiRoute]):
    """The routes of a module, registered by `add` above each function."""

    def add(
        self,
        path: str,
        summary: str,
        query: tuple[str, ...] = (),
        *,
        method: str = "get",
        versioned: bool | Callable[[Request], bool] = False,
        content: str = "application/json",
        body: Mapping[str, Any] | None = None,
        raw: bool = False,
    ) -> Callable[[Handler], Handler]:
        """Registers a function that takes a `RouteCall` and returns what becomes JSON, or a Response.

        `query`: the names that it reads; `openapi.py` has the schema of each. A `versioned` answer depends on
        nothing but the run file's version and the URL. `body`: the JSON schema of a request's body. A `raw`
        function is a coroutine that takes the Request.
        """

        def register(handler: Handler) -> Handler:
            self.append(
                ApiRoute(
                    path=path,
                    summary=summary,
                    handler=handler,
                    query=query,
                    method=method,
                    versioned=versioned,
                    content=content,
                    body=body,
                    raw=raw,
                )
            )
            return handler

        return register


def version_of(run: RunFile) -> str:
    """The version as the page sees it: opaque, equal when nothing is new."""
    return etag(run.id, run.version())[3:-1]
