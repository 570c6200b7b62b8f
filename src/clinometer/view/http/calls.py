"""How a route reads: in one of a few threads, errors as sentences, an ETag of the run's version."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

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


def route(
    path: str,
    handler: Callable[[RouteCall], Any],
    *,
    versioned: bool | Callable[[Request], bool] = False,
    methods: tuple[str, ...] = ("GET",),
) -> Route:
    """`handler` returns what becomes JSON, or a Response.

    A versioned answer depends on nothing but the run file's version and the URL.
    """

    def answer(request: Request) -> Response:
        library: Library = request.app.state.library
        query = Query(request.query_params, request.app.state.language)
        call = RouteCall(request, query, library)
        try:
            tag = None
            if versioned(request) if callable(versioned) else versioned:
                tag = etag(version_of(call.run()), request.url.path, request.url.query, query.language)
                if (known := not_modified(request, tag)) is not None:
                    return known
            data = handler(call)
            return data if isinstance(data, Response) else json_answer(request, data, tag=tag)
        except ApiError as error:
            return json_answer(request, error.body(query.language), error.status)
        except InputError as error:
            return json_answer(request, body_of(error, query.language), 422)
        except Exception:
            # One broken run must not take the page down; whoever started the server sees where it broke.
            traceback.print_exc(file=sys.stderr)
            return json_answer(request, ApiError(500, "view.failed").body(query.language), 500)

    async def endpoint(request: Request) -> Response:
        pool: ThreadPoolExecutor = request.app.state.pool
        return await asyncio.get_running_loop().run_in_executor(pool, answer, request)

    return Route(path, endpoint, methods=list(methods))


def version_of(run: RunFile) -> str:
    """The version as the page sees it: opaque, equal when nothing is new."""
    return etag(run.id, run.version())[3:-1]
