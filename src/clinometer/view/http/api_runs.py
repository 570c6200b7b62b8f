"""Routes that read the run file: the list of runs, one run, its alerts, events, reports and rows."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from clinometer.messages import LANGUAGES, InputError, language_value, sentences
from clinometer.record.read.reader import RunFile
from clinometer.record.replays.replays import replayed_steps
from clinometer.view.errors import ApiError
from clinometer.view.figures.order import in_order
from clinometer.view.figures.strip import last_values, strip
from clinometer.view.figures.words import alert_sentences, statistic_choices
from clinometer.view.http.calls import RUN, RouteCall, Routes, version_of
from clinometer.view.library import MAX_RUNS, Library

MAX_ALERTS = 1_000
MAX_EVENTS = 1_000
MAX_REPORTS = 50
NAMES_IN_ALERT = 1_000

routes = Routes()


@routes.add(
    "/api/live",
    "server-sent events: runs that have something new",
    ("run",),
    content="text/event-stream",
    raw=True,
)
async def live(request: Request) -> Response:
    return await request.app.state.live.answer(request)


@routes.add("/api/messages", "the page's sentences", ("lang",))
def messages(call: RouteCall) -> Any:
    said = {key: text for key, text in sentences(call.language).items() if key.startswith("page.")}
    return {
        "lang": call.language,
        "tag": language_value(call.language, "tag"),
        "locale": language_value(call.language, "locale"),
        "languages": {code: language_value(code, "name") for code in LANGUAGES},
        "messages": said,
    }


@routes.add("/api/theme", "colours of both themes and the map's scale")
def theme(call: RouteCall) -> Any:
    from clinometer.view.figures import colours

    return {
        **{theme: dict(colours.tokens(theme)) for theme in colours.THEMES},
        "scale": {theme: colours.scale(theme) for theme in colours.THEMES},
    }


@routes.add("/api/runs", "the runs, newest first", ("lang",))
def runs(call: RouteCall) -> Any:
    library = call.library
    listed = [_summary(library, run) for run in library.runs()]
    return {
        "runs": listed,
        "root": library.root.resolve().name,
        "broken": [{"folder": b.folder, "text": b.error.render(call.language)} for b in library.broken],
    }


@routes.add(RUN, "one run with its tensors and alerts", ("lang",))
def run(call: RouteCall) -> Any:
    run = call.run()
    tensors = in_order(run.tensors())
    names = {tensor["id"]: tensor["name"] for tensor in tensors}
    info = _summary(call.library, run)
    whole = run.info()
    return {
        **info,
        "config": whole["config"],
        "environment": whole["environment"],
        "statistics": whole["statistics"],
        "derived": whole["derived"],
        "choices": statistic_choices((*whole["statistics"], *whole["derived"]), call.language),
        "tensors": tensors,
        "scalar_names": run.scalar_names(),
        "alerts": _alerts(run, call.language, None, None),
        "pinned": [{**pin, "name": names.get(pin["tensor"], "")} for pin in run.pinned()],
        "replays": replayed_steps(run.folder),
        "version": version_of(run),
    }


@routes.add(
    RUN + "/strip", "loss, gradient norm, speed and alerts over the last 100 steps", ("lang",), versioned=True
)
def numbers(call: RouteCall) -> Any:
    run = call.run()
    return {"numbers": strip(run, call.language), "version": version_of(run)}


@routes.add(RUN + "/alerts", "alerts that touch a range of steps", ("from", "to", "lang"), versioned=True)
def alerts(call: RouteCall) -> Any:
    first, last = call.query.steps()
    return {"alerts": _alerts(call.run(), call.language, first, last)}


@routes.add(RUN + "/events", "events, newest first", ("kind", "from", "to", "limit", "lang"), versioned=True)
def events(call: RouteCall) -> Any:
    first, last = call.query.steps()
    limit = call.query.whole("limit", 1, MAX_EVENTS, 100) or 100
    kind = call.query.values.get("kind") or None
    found = call.run().events(kind, first, last, limit, newest=True)
    return {"events": [_without_document(event) for event in found]}


@routes.add(RUN + "/reports", "diagnoses and checks, newest first", ("lang",), versioned=True)
def reports(call: RouteCall) -> Any:
    found = call.run().events("report", limit=MAX_REPORTS, newest=True)
    return {"reports": [report(event, call.language) for event in found]}


def report(event: dict[str, Any], language: str) -> dict[str, Any]:
    """A report event with its text in one language."""
    data = event["data"]
    return {
        "id": event["id"],
        "step": event["step"],
        "time": event["time"],
        "kind": data.get("kind", ""),
        "title": in_language(data.get("title", ""), language),
        "text": in_language(data.get("text", ""), language),
        "document": data.get("document"),
    }


@routes.add(RUN + "/step", "the recorded row of one step", ("step", "lang"), versioned=True)
def step(call: RouteCall) -> Any:
    run = call.run()
    wanted = call.query.needed("step")
    row = run.row(wanted)
    if row is None:
        raise ApiError(404, "view.no_step", step=wanted)
    order = [tensor["id"] for tensor in in_order(run.tensors())]
    statistics = np.asarray(row["statistics"])
    known = [i for i in order if i < len(statistics)]
    return {
        "step": row["step"],
        "time": row["time"],
        "scalars": row["scalars"],
        "statistics": {"names": list(run.info()["statistics"]), "ids": known, "rows": statistics[known]},
    }


def states(library: Library, wanted: set[str] | None) -> dict[str, dict[str, Any]]:
    """What the live stream tells about each run: its version, state and last step."""
    found: dict[str, dict[str, Any]] = {}
    for identity in library.ids() if wanted is None else wanted:
        with suppress(ApiError, InputError):
            run = library.open(identity)
            info = run.info()
            found[identity] = {
                "run": identity,
                "version": version_of(run),
                "state": info["state"],
                "last_step": info["last_step"],
            }
    return found


def in_language(value: Any, language: str) -> str:
    """A text stored by language, or plain; English if it was stored without this language."""
    if isinstance(value, dict):
        value = value.get(language) or value.get("en") or next(iter(value.values()), "")
    return str(value)


def _summary(library: Library, run: RunFile) -> dict[str, Any]:
    """A run's line in the list; read again when its version changes."""
    version = run.version()
    known = library.summaries.get(run.id)
    if known is not None and known[0] == version:
        return {**known[1], "replayable": run.info()["replayable"]}
    info = run.info()
    at_length = ("config", "environment", "statistics", "derived")
    told = {key: value for key, value in info.items() if key not in at_length}
    told |= {"folder": library.name(run.folder), **last_values(run)}
    library.summaries[run.id] = (version, told)
    while len(library.summaries) > 2 * MAX_RUNS:
        library.summaries.pop(next(iter(library.summaries)))
    return told


def _alerts(run: RunFile, language: str, first: int | None, last: int | None) -> list[dict[str, Any]]:
    found = []
    for alert in run.alerts(first, last, MAX_ALERTS):
        text, remedy = alert_sentences(alert, language)
        found.append({**alert, "tensors": alert["tensors"][:NAMES_IN_ALERT], "text": text, "remedy": remedy})
    return found


def _without_document(event: dict[str, Any]) -> dict[str, Any]:
    if event["kind"] != "report":
        return event
    return {**event, "data": {k: v for k, v in event["data"].items() if k not in ("document", "text")}}
