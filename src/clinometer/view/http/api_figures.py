"""Routes that draw: figures, the map's cells, and several runs compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request

from clinometer.record.read.reader import RunFile
from clinometer.view import figures
from clinometer.view.errors import ApiError
from clinometer.view.figures.compare import METRICS
from clinometer.view.figures.gradient_map import map_answer, read_map
from clinometer.view.figures.style import style
from clinometer.view.http.calls import RUN, RouteCall, Routes, version_of
from clinometer.vocabulary import HISTOGRAM_KINDS

MAX_POINTS = 4_000
MAX_COLUMNS = 2_560
MAX_COMPARED = 20
MAX_STATISTICS = 4
MAX_TENSORS = 1_000

routes = Routes()


def _of_the_file_alone(request: Request) -> bool:
    return request.path_params["name"] not in _OF_REPLAYS


@routes.add(
    RUN + "/figure/{name}",
    "a Plotly figure and its caption",
    (
        "lang",
        "theme",
        "from",
        "to",
        "points",
        "smooth",
        "stat",
        "columns",
        "tensors",
        "tensor",
        "kind",
        "count",
        "step",
        "index",
    ),
    versioned=_of_the_file_alone,
)
def figure(call: RouteCall) -> Any:
    name = call.request.path_params["name"]
    run = call.run()
    if name not in _FIGURES:
        raise ApiError(404, "view.no_figure", name=name[:40], known=", ".join(_FIGURES))
    drawn = _FIGURES[name](call, run)
    return {"name": name, **drawn.to_dict(), "version": version_of(run)}


@routes.add(
    RUN + "/map",
    "cells of the gradient map",
    ("lang", "theme", "from", "to", "stat", "columns", "tensors"),
    versioned=True,
)
def cells(call: RouteCall) -> Any:
    run = call.run()
    found = read_map(run, **_map_values(call, run))
    return {**map_answer(found, style(call.language, call.query.theme())), "version": version_of(run)}


@routes.add("/api/compare", "a figure of several runs", ("lang", "theme", "from", "to", "ids", "metric"))
def compared(call: RouteCall) -> Any:
    ids = call.query.texts("ids", MAX_COMPARED)
    if not ids:
        raise ApiError(400, "view.needed", name="ids")
    metric = call.query.choice("metric", METRICS, "loss")
    # Each open file may be closed for the next: a thread keeps few. So runs are read one after the other.
    runs = [call.library.open(identity) for identity in dict.fromkeys(ids)]
    drawn = figures.compare(runs, metric=metric, **_looks(call), **_range(call))
    return {"name": "compare", **drawn.to_dict()}


def _looks(call: RouteCall) -> dict[str, Any]:
    return {"language": call.language, "theme": call.query.theme()}


def _range(call: RouteCall) -> dict[str, Any]:
    first, last = call.query.steps()
    return {"first": first, "last": last}


def _points(call: RouteCall) -> dict[str, Any]:
    return {**_looks(call), **_range(call), "points": call.query.whole("points", 100, MAX_POINTS, 1_000)}


def _statistic(call: RouteCall, run: RunFile, name: str) -> str:
    info = run.info()
    known = (*info["statistics"], *info["derived"])
    if name not in known:
        raise ApiError(400, "view.choice", name="stat", given=name[:60], choices=", ".join(known))
    return name


def _map_values(call: RouteCall, run: RunFile) -> dict[str, Any]:
    first, last = call.query.steps()
    ids = call.query.wholes("tensors", MAX_TENSORS)
    known = {tensor["id"] for tensor in run.tensors()}
    if not set(ids) <= known:
        raise ApiError(404, "view.no_tensor", tensor=min(set(ids) - known))
    return {
        "statistic": _statistic(call, run, call.query.values.get("stat") or "grad_norm"),
        "first": first,
        "last": last,
        "columns": call.query.whole("columns", 16, MAX_COLUMNS, 1_280),
        "ids": ids or None,
    }


def _map(call: RouteCall, run: RunFile) -> figures.Figure:
    values = _map_values(call, run)
    return figures.gradient_map(
        run, stat=values.pop("statistic"), tensors=values.pop("ids"), **values, **_looks(call)
    )


def _loss(call: RouteCall, run: RunFile) -> figures.Figure:
    return figures.loss(run, **_points(call), smooth=call.query.number("smooth", 0.0, 0.999))


def _tensor(call: RouteCall, run: RunFile) -> figures.Figure:
    names = call.query.texts("stat", MAX_STATISTICS) or ["grad_norm"]
    stats = [_statistic(call, run, name) for name in names]
    return figures.tensor(run, tensor=call.tensor(run), stat=stats, **_points(call))


def _kind(call: RouteCall) -> str:
    return call.query.choice("kind", HISTOGRAM_KINDS, "grad")


def _ridge(call: RouteCall, run: RunFile) -> figures.Figure:
    count = call.query.whole("count", 4, 128, 64) or 64
    return figures.ridge(
        run, tensor=call.tensor(run), kind=_kind(call), count=count, **_looks(call), **_range(call)
    )


def _histogram(call: RouteCall, run: RunFile) -> figures.Figure:
    return figures.histogram(
        run, tensor=call.tensor(run), kind=_kind(call), step=call.query.needed("step"), **_looks(call)
    )


def _entry(call: RouteCall, run: RunFile) -> dict[str, Any]:
    tensor = call.tensor(run)
    return {"tensor": tensor, "index": call.index(tensor["shape"])}


def _waterfall(call: RouteCall, run: RunFile) -> figures.Figure:
    return figures.waterfall(run, **_entry(call, run), step=call.query.needed("step"), **_looks(call))


def _history(call: RouteCall, run: RunFile) -> figures.Figure:
    return figures.weight_history(run, **_entry(call, run), **_points(call))


def _shares(call: RouteCall, run: RunFile) -> figures.Figure:
    return figures.shares(run, **_entry(call, run), step=call.query.needed("step"), **_looks(call))


_OF_REPLAYS = frozenset({"waterfall", "batch-loss", "shares"})
"""These change when a step is replayed, which does not change the run file."""

_FIGURES: dict[str, Callable[[RouteCall, RunFile], figures.Figure]] = {
    "loss": _loss,
    "lr": lambda call, run: figures.lr(run, **_points(call)),
    "norm": lambda call, run: figures.norm(run, **_points(call)),
    "speed": lambda call, run: figures.speed(run, **_points(call)),
    "noise": lambda call, run: figures.noise(run, **_points(call)),
    "map": _map,
    "tensor": _tensor,
    "ridge": _ridge,
    "histogram": _histogram,
    "waterfall": _waterfall,
    "weight-history": _history,
    "batch-loss": lambda call, run: figures.batch_loss(run, step=call.query.needed("step"), **_looks(call)),
    "shares": _shares,
}
