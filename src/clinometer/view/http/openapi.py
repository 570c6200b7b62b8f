"""All routes of the API, and their description as OpenAPI 3.1, made from their registrations."""

from __future__ import annotations

from typing import Any

from clinometer import __version__
from clinometer.messages import LANGUAGES
from clinometer.view.http import api_figures, api_replays, api_runs
from clinometer.view.http.calls import ApiRoute, RouteCall, Routes
from clinometer.view.http.query import WHOLE

_PLACES = {"id": "a run's id", "name": "a figure's name", "job": "a job's id"}
_TEXT = {"type": "string"}
_SCHEMAS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("from", "to", "step", "row"), WHOLE),
    "lang": {"enum": list(LANGUAGES)},
    "theme": {"enum": ["light", "dark"]},
    "limit": {**WHOLE, "maximum": 1_000},
    "points": {**WHOLE, "minimum": 100, "maximum": 4_000},
    "columns": {**WHOLE, "minimum": 16, "maximum": 2_560},
    "count": {**WHOLE, "minimum": 4, "maximum": 128},
    "rows": {"type": "string", "description": "of a batch: how many; of a matrix: first,end"},
    "position": {"type": "string", "description": "sequence,position in the batch, both from 0"},
    "height": {**WHOLE, "maximum": 512},
    "width": {**WHOLE, "maximum": 512},
    "smooth": {"type": "number", "minimum": 0, "maximum": 0.999},
}
_ERROR = {
    "description": "what is wrong, in a sentence",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "error": {
                        "type": "object",
                        "properties": {"key": {"type": "string"}, "text": {"type": "string"}},
                    }
                },
            }
        }
    },
}


routes = Routes()


@routes.add("/api/openapi.json", "this description")
def openapi(call: RouteCall) -> Any:
    return description()


def all_routes() -> tuple[ApiRoute, ...]:
    """Every route of the API: what the server serves and the document describes."""
    return (*routes, *api_runs.routes, *api_figures.routes, *api_replays.routes)


def description() -> dict[str, Any]:
    """The OpenAPI document."""
    paths: dict[str, dict[str, Any]] = {}
    for route in all_routes():
        paths.setdefault(route.path, {})[route.method] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Clinometer's microscope", "version": __version__},
        "paths": paths,
    }


def _operation(route: ApiRoute) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": _TEXT, "description": what}
        for name, what in _PLACES.items()
        if "{" + name + "}" in route.path
    ]
    parameters += [{"name": n, "in": "query", "schema": _SCHEMAS.get(n, _TEXT)} for n in route.query]
    if route.method != "get":
        parameters.append(
            {"name": "X-Clinometer", "in": "header", "required": True, "schema": {"const": "1"}}
        )
    operation: dict[str, Any] = {
        "summary": route.summary,
        "parameters": parameters,
        "responses": {
            "202" if route.method == "post" else "200": {
                "description": route.summary,
                "content": {route.content: {}},
            },
            "4XX": _ERROR,
        },
    }
    if route.body is not None:
        content = {"application/json": {"schema": route.body}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation
