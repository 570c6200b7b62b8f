"""Routes that look into a replayed step, and those that start and cancel a replay."""

from __future__ import annotations

import asyncio
import math
from itertools import zip_longest
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from clinometer.foreign_files import parse_json
from clinometer.record.read.reader import RunFile
from clinometer.record.replays.replays import KINDS, Replay, replayed_steps
from clinometer.view.errors import ApiError
from clinometer.view.figures.batch import matrix as as_matrix
from clinometer.view.figures.style import packed
from clinometer.view.figures.weight import pinned_row
from clinometer.view.http.answers import json_answer
from clinometer.view.http.calls import RUN, RouteCall, Routes
from clinometer.view.http.query import LAST_STEP, WHOLE, Query
from clinometer.view.jobs import Replays

MAX_BODY = 4_096
MAX_SIDE = 512
MAX_ROWS = 64
MAX_MOVED = 10
"""Tensors in the answer about one token."""
MAX_CELLS = 65_536
"""Tokens in one answer, for any context length."""
BODY_SECONDS = 10.0
_WORDS = ("NaN", "Infinity", "-Infinity")
REPLAY_BODY = {
    "type": "object",
    "required": ["step"],
    "properties": {
        "step": WHOLE,
        "tensor": {"type": ["string", "null"]},
        "index": {"type": ["array", "null"], "items": WHOLE},
    },
}

routes = Routes()


@routes.add(RUN + "/replays", "the replayed steps", ("lang",))
def replays(call: RouteCall) -> Any:
    run = call.run()
    return {"steps": replayed_steps(run.folder), "replayable": run.info()["replayable"]}


@routes.add(
    RUN + "/matrix",
    "a part of a tensor at a replayed step, block-averaged",
    ("step", "tensor", "kind", "rows", "cols", "height", "width", "lang"),
)
def matrix(call: RouteCall) -> Any:
    run, query = call.run(), call.query
    tensor = call.tensor(run)
    replay, _ = _replay(call, run)
    try:
        found = replay.matrix(
            tensor["name"],
            query.choice("kind", KINDS, "grad"),
            query.range("rows"),
            query.range("cols"),
            height=query.whole("height", 1, MAX_SIDE, 256) or 256,
            width=query.whole("width", 1, MAX_SIDE, 256) or 256,
        )
    except KeyError:
        raise ApiError(404, "view.no_matrix", tensor=tensor["name"]) from None
    values = np.ascontiguousarray(found["values"], dtype=np.float32)
    size = np.abs(values[np.isfinite(values) & (values != 0)])
    low, high = (float(x) for x in np.percentile(np.log10(size), [1, 100])) if size.size else (-1.0, 1.0)
    shape = list(found["shape"])
    flat = [shape[0] if shape else 1, int(np.prod(shape[1:], dtype=np.int64))]
    return {
        **found,
        "values": packed(values)["bdata"],
        "height": values.shape[0],
        "width": values.shape[1],
        "shape": flat,
        "full_shape": shape,
        "low": low,
        "high": max(high, low + 1e-6),
        "zeros": float((values == 0).mean()) if values.size else 0.0,
        "not_finite": int((~np.isfinite(values)).sum()),
    }


@routes.add(RUN + "/entry", "one weight's numbers at a replayed step", ("step", "tensor", "index", "lang"))
def entry(call: RouteCall) -> Any:
    run = call.run()
    tensor = call.tensor(run)
    index = call.index(tensor["shape"])
    replay, _ = _replay(call, run)
    return _entry(replay, tensor["name"], index)


@routes.add(
    RUN + "/weight",
    "a weight's anatomy and who pushed it",
    ("step", "tensor", "index", "row", "rows", "lang"),
)
def weight(call: RouteCall) -> Any:
    run = call.run()
    tensor = call.tensor(run)
    index = call.index(tensor["shape"])
    step = call.query.needed("step")
    replay = Replay.open(run.folder, step)
    told: dict[str, Any] = {
        "state": "none",
        "entry": None,
        "recorded": pinned_row(run, tensor, index, step),
        **dict.fromkeys(("anatomy", "anatomy_text", "attribution", "attribution_text", "tokens", "pieces")),
    }
    if replay is None:
        return told
    told["state"] = "step"
    told["entry"] = _entry(replay, tensor["name"], index)
    found = replay.weight(tensor["name"], index)
    if found is None:
        return told
    shares = found.get("tokens") or []
    pieces: list[Any] = replay.step_info["batch"].get("pieces") or []
    first, rows = _rows(call, pieces or shares)
    attribution = found.get("attribution")
    return {
        **told,
        "state": "ready",
        "anatomy": found.get("anatomy"),
        "anatomy_text": _said(found.get("anatomy_text"), call.language),
        "attribution": attribution and _bounded(attribution),
        "attribution_text": _said(found.get("attribution_text"), call.language),
        "tokens": _numbers(shares[first : first + rows]),
        "pieces": pieces[first : first + rows],
        "largest": _largest(shares),
        "row": first,
        "rows": rows,
        "sequences": len(pieces or shares),
    }


@routes.add(RUN + "/batch", "a replayed batch, token by token", ("step", "row", "rows", "lang"))
def batch(call: RouteCall) -> Any:
    run = call.run()
    step = call.query.needed("step")
    replay = Replay.open(run.folder, step)
    if replay is None:
        return {"state": "none", "step": step}
    info = replay.step_info
    found = info["batch"]
    losses = _counted(found.get("loss") or [], found.get("targets") or [])
    token_ids = found.get("token_ids") or []
    first, rows = _rows(call, token_ids)
    part = slice(first, first + rows)
    lists = ("token_ids", "targets", "pieces", "target_pieces")
    plain = ("loss", "recorded_loss", "exact", "lr", "clip", "max_norm", "total_norm", "optimizer")
    return {
        "state": "ready",
        "step": step,
        **{name: _number(info.get(name)) for name in plain},
        "row": first,
        "rows": rows,
        "sequences": len(token_ids),
        "length": max((len(row) for row in token_ids), default=0),
        **{name: (found.get(name) or [])[part] for name in lists},
        "loss_per_token": _numbers(losses[part]),
        "grad_norm": _numbers((found.get("grad_norm") or [])[part]),
        "loss_not_finite": _not_finite(losses[part], first),
        "grad_not_finite": _not_finite((found.get("grad_norm") or [])[part], first),
        "loss_range": _ends(losses),
        "grad_range": _ends(found.get("grad_norm")),
    }


@routes.add(RUN + "/token", "the tensors that a token moved most", ("step", "position", "lang"))
def token(call: RouteCall) -> Any:
    """The tensors that one token of a replayed batch moved most."""
    run = call.run()
    replay, step = _replay(call, run)
    place = call.query.wholes("position", 2)
    if len(place) != 2:
        raise ApiError(400, "view.position", position=call.query.values.get("position", "")[:60])
    told: dict[str, Any] = {"state": "older", "step": step, "position": place, "tensors": []}
    try:
        found = replay.token(place[0], place[1], MAX_MOVED)
    except IndexError:
        sequences = replay.step_info["batch"].get("token_ids") or []
        shape = f"{len(sequences)} × {max((len(row) for row in sequences), default=0)}"
        raise ApiError(404, "view.no_token", position=f"{place[0]},{place[1]}", shape=shape) from None
    except KeyError:  # removed while it was read
        raise ApiError(404, "view.no_replay", step=step) from None
    if found is None:
        return told
    tensors = [{**one, "finite": math.isfinite(one["norm"])} for one in found]
    return {**told, "state": "ready", "tensors": tensors}


@routes.add(RUN + "/replay", "starts a replay", ("lang",), method="post", body=REPLAY_BODY, raw=True)
async def start(request: Request) -> Response:
    """POST: replay a step, and explain one weight of it."""
    state = request.app.state
    query = Query(request.query_params, state.language)
    body = await _body(request)

    def work() -> Response:
        call = RouteCall(request, query, state.library)
        try:
            run = call.run()
            step, tensor, index = _asked(body, run)
            info = run.info()
            if not info["replayable"]:
                raise ApiError(409, "view.not_replayable")
            if info["last_step"] is None or step > info["last_step"]:
                raise ApiError(404, "view.no_step", step=step)
            found, new = state.replays.start(run.id, run.folder, step, tensor, index, language=query.language)
        except ApiError as error:
            return json_answer(request, error.body(query.language), error.status)
        return json_answer(request, {"job": found.to_dict(query.language)}, 202 if new else 200)

    return await asyncio.get_running_loop().run_in_executor(state.pool, work)


@routes.add("/api/jobs", "the last replays", ("lang",))
def jobs(call: RouteCall) -> Any:
    return {"jobs": [found.to_dict(call.language) for found in _jobs(call).all()]}


@routes.add("/api/jobs/{job}", "one replay's progress", ("lang",))
def job(call: RouteCall) -> Any:
    return {"job": _jobs(call).get(call.request.path_params["job"]).to_dict(call.language)}


@routes.add("/api/jobs/{job}", "cancels a replay", ("lang",), method="delete")
def cancel(call: RouteCall) -> Any:
    return {"job": _jobs(call).cancel(call.request.path_params["job"]).to_dict(call.language)}


def _jobs(call: RouteCall) -> Replays:
    return call.request.app.state.replays


async def _body(request: Request) -> Any:
    """The JSON of a request: small, typed, and in time."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ApiError(415, "view.not_json")
    content = b""

    async def read() -> None:
        nonlocal content
        async for chunk in request.stream():
            content += chunk
            if len(content) > MAX_BODY:
                raise ApiError(413, "view.too_large", limit=MAX_BODY)

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
        return parse_json(content)
    except ValueError:
        raise ApiError(400, "view.not_json") from None
    except TimeoutError:
        raise ApiError(408, "view.not_json") from None


def _asked(body: Any, run: RunFile) -> tuple[int, str | None, tuple[int, ...] | None]:
    if not isinstance(body, dict):
        raise ApiError(400, "view.not_json")
    step, name, index = body.get("step"), body.get("tensor"), body.get("index")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= LAST_STEP:
        raise ApiError(400, "view.between", name="step", given=str(step)[:60], low=0, high=LAST_STEP)
    if name is None:
        if index is not None:
            raise ApiError(400, "view.needed", name="tensor")
        return step, None, None
    shape = next((t["shape"] for t in run.tensors() if t["name"] == name), None)
    if shape is None:
        raise ApiError(404, "view.no_tensor", tensor=str(name)[:200])
    if (
        not isinstance(index, list)
        or len(index) != len(shape)
        or not all(type(i) is int and 0 <= i < size for i, size in zip(index, shape, strict=True))
    ):
        raise ApiError(400, "view.index", index=str(index)[:60], shape=list(shape))
    return step, name, tuple(index)


def _replay(call: RouteCall, run: RunFile) -> tuple[Replay, int]:
    step = call.query.needed("step")
    replay = Replay.open(run.folder, step)
    if replay is None:
        raise ApiError(404, "view.no_replay", step=step)
    return replay, step


def _entry(replay: Replay, name: str, index: tuple[int, ...]) -> dict[str, Any] | None:
    try:
        return replay.entry(name, index)
    except (KeyError, IndexError):
        return None


def _rows(call: RouteCall, sequences: list[Any]) -> tuple[int, int]:
    """The requested sequences: within the batch, and no more tokens than one answer may have."""
    longest = max((len(row) for row in sequences), default=1)
    most = max(1, MAX_CELLS // max(1, longest))
    rows = min(call.query.whole("rows", 1, MAX_ROWS, 8) or 8, most)
    first = min(call.query.whole("row", 0, LAST_STEP, 0) or 0, max(0, len(sequences) - 1))
    return first, max(0, min(rows, len(sequences) - first))


def _counted(losses: list[Any], targets: list[Any]) -> list[Any]:
    """The losses, null where the target is one that does not count: a negative number, such as −100."""
    return [
        [None if s < len(wanted) and wanted[s] < 0 else value for s, value in enumerate(row)]
        for row, wanted in zip_longest(losses, targets[: len(losses)], fillvalue=())
    ]


def _not_finite(rows: list[Any], first: int) -> list[list[int]]:
    """(sequence, position) of what is NaN or infinite: in the numbers it is null, as is what is not there."""
    return [[first + b, s] for b, row in enumerate(rows) for s, value in enumerate(row) if value in _WORDS]


def _numbers(rows: list[Any]) -> list[Any]:
    """Rows of numbers; the strings for values that are not finite become null."""
    return [[_number(value) for value in row] for row in rows]


def _number(value: Any) -> Any:
    return None if value in _WORDS else value


def _ends(rows: Any) -> list[float] | None:
    values = as_matrix(rows)
    if values is None or not np.isfinite(values).any():
        return None
    good = values[np.isfinite(values)]
    return [float(good.min()), float(good.max())]


def _largest(rows: Any) -> float | None:
    """The largest |share| in the whole batch: the end of the colours."""
    ends = _ends(rows)
    return None if ends is None else max(abs(ends[0]), abs(ends[1]))


def _bounded(attribution: dict[str, Any]) -> dict[str, Any]:
    """Without what grows with the batch; the shares are sent separately, in pages."""
    told = {k: v for k, v in attribution.items() if k not in ("matrix", "norms", "tokens")}
    told["uses"] = [{k: v for k, v in use.items() if k != "terms"} for use in attribution.get("uses", [])]
    return told


def _said(text: Any, language: str) -> str | None:
    return text.get(language, text.get("en")) if isinstance(text, dict) else text
