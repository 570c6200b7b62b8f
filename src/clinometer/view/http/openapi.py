"""The API described as OpenAPI 3.1: every route, its query and its answer in a word."""

from __future__ import annotations

from typing import Any

from clinometer import __version__

_PLACES = {"id": "a run's id", "name": "a figure's name", "job": "a job's id"}
_TIME = ("from", "to")
_LOOKS = ("lang", "theme")
_ENTRY = ("step", "tensor", "index")

_FIGURE = ("points", "smooth", "stat", "columns", "tensors", "tensor", "kind", "count", "step", "index")
_MAP = ("stat", "columns", "tensors")
_MATRIX = ("step", "tensor", "kind", "rows", "cols", "height", "width")
_RUN = "/api/runs/{id}"

# path, method, what it answers, query
_ROUTES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("/api/openapi.json", "get", "this description", ()),
    ("/api/live", "get", "server-sent events: runs that have something new", ("run",)),
    ("/api/messages", "get", "the page's sentences", ("lang",)),
    ("/api/theme", "get", "colours of both themes and the map's scale", ()),
    ("/api/runs", "get", "the runs, newest first", ("lang",)),
    (_RUN, "get", "one run with its tensors and alerts", ("lang",)),
    (f"{_RUN}/strip", "get", "loss, gradient norm, speed and alerts over the last 100 steps", ("lang",)),
    (f"{_RUN}/alerts", "get", "alerts that touch a range of steps", (*_TIME, "lang")),
    (f"{_RUN}/events", "get", "events, newest first", ("kind", *_TIME, "limit", "lang")),
    (f"{_RUN}/reports", "get", "diagnoses and checks, newest first", ("lang",)),
    (f"{_RUN}/step", "get", "the recorded row of one step", ("step", "lang")),
    (f"{_RUN}/figure/{{name}}", "get", "a Plotly figure and its caption", (*_LOOKS, *_TIME, *_FIGURE)),
    (f"{_RUN}/map", "get", "cells of the gradient map", (*_LOOKS, *_TIME, *_MAP)),
    ("/api/compare", "get", "a figure of several runs", (*_LOOKS, *_TIME, "ids", "metric")),
    (f"{_RUN}/replays", "get", "the replayed steps", ("lang",)),
    (f"{_RUN}/matrix", "get", "a part of a tensor at a replayed step, block-averaged", (*_MATRIX, "lang")),
    (f"{_RUN}/entry", "get", "one weight's numbers at a replayed step", (*_ENTRY, "lang")),
    (f"{_RUN}/weight", "get", "a weight's anatomy and who pushed it", (*_ENTRY, "row", "rows", "lang")),
    (f"{_RUN}/batch", "get", "a replayed batch, token by token", ("step", "row", "rows", "lang")),
    (f"{_RUN}/token", "get", "the tensors that a token moved most", ("step", "position", "lang")),
    (f"{_RUN}/replay", "post", "starts a replay", ("lang",)),
    ("/api/jobs", "get", "the last replays", ("lang",)),
    ("/api/jobs/{job}", "get", "one replay's progress", ("lang",)),
    ("/api/jobs/{job}", "delete", "cancels a replay", ("lang",)),
)
_TEXT = {"type": "string"}
_WHOLE = {"type": "integer", "minimum": 0}
_SCHEMAS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("from", "to", "step", "row"), _WHOLE),
    "lang": {"enum": ["en", "zh"]},
    "theme": {"enum": ["light", "dark"]},
    "limit": {**_WHOLE, "maximum": 1_000},
    "points": {**_WHOLE, "minimum": 100, "maximum": 4_000},
    "columns": {**_WHOLE, "minimum": 16, "maximum": 2_560},
    "count": {**_WHOLE, "minimum": 4, "maximum": 128},
    "rows": {"type": "string", "description": "of a batch: how many; of a matrix: first,end"},
    "position": {"type": "string", "description": "sequence,position in the batch, both from 0"},
    "height": {**_WHOLE, "maximum": 512},
    "width": {**_WHOLE, "maximum": 512},
    "smooth": {"type": "number", "minimum": 0, "maximum": 0.999},
}
_REPLAY_BODY = {
    "type": "object",
    "required": ["step"],
    "properties": {
        "step": _WHOLE,
        "tensor": {"type": ["string", "null"]},
        "index": {"type": ["array", "null"], "items": _WHOLE},
    },
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


def description() -> dict[str, Any]:
    """The OpenAPI document."""
    paths: dict[str, dict[str, Any]] = {}
    for path, method, summary, query in _ROUTES:
        places = [name for name in _PLACES if "{" + name + "}" in path]
        kind = "text/event-stream" if path == "/api/live" else "application/json"
        operation: dict[str, Any] = {
            "summary": summary,
            "parameters": [
                *(
                    {
                        "name": n,
                        "in": "path",
                        "required": True,
                        "schema": {"type": "string"},
                        "description": _PLACES[n],
                    }
                    for n in places
                ),
                *({"name": n, "in": "query", "schema": _SCHEMAS.get(n, _TEXT)} for n in query),
            ],
            "responses": {
                "202" if method == "post" else "200": {"description": summary, "content": {kind: {}}},
                "4XX": _ERROR,
            },
        }
        if method != "get":
            operation["parameters"].append(
                {"name": "X-Clinometer", "in": "header", "required": True, "schema": {"const": "1"}}
            )
        if method == "post":
            operation["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": _REPLAY_BODY}},
            }
        paths.setdefault(path, {})[method] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Clinometer's microscope", "version": __version__},
        "paths": paths,
    }
