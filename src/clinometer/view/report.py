"""`clinometer report`: one self-contained HTML file with the figures and facts of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from clinometer import __version__
from clinometer.messages import InputError, current_language, language_value, say
from clinometer.record.read.reader import RunFile
from clinometer.view import figures
from clinometer.view.figures.colours import THEMES, stylesheet
from clinometer.view.figures.order import in_order
from clinometer.view.figures.strip import strip
from clinometer.view.figures.style import Figure, four
from clinometer.view.figures.words import alert_sentences
from clinometer.view.http.answers import plain
from clinometer.view.http.api_runs import in_language
from clinometer.view.http.static_files import plotly_script
from clinometer.whole_files import write_whole

MARK = "<!-- Clinometer's report -->"
MAX_ALERTS = 100
MAX_TENSORS = 2_000
MAP_COLUMNS = 600
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_SECTIONS = ("loss", "map", "norm", "lr", "speed")

Say = Callable[..., str]


def write_report(run: RunFile, to: Path, language: str | None = None) -> int:
    """Write the report of `run` to `to`, whole or not at all; its size in bytes.

    Raises `InputError` if `to` is no .html name, is there already and no report, or cannot be written.
    """
    if to.suffix.lower() not in (".html", ".htm"):
        raise InputError("view.report_not_html", path=to)
    page = report(run, language).encode()
    try:
        if to.exists() and not _is_report(to):
            raise InputError("view.report_exists", path=to)
        to.parent.mkdir(parents=True, exist_ok=True)
        write_whole(to, page)
    except OSError as error:
        raise InputError("view.report_not_written", path=to, reason=error.strerror or error) from None
    return len(page)


def report(run: RunFile, language: str | None = None) -> str:
    """The page: it loads nothing, and shows text from the run as text."""
    language = language or current_language()

    def words(key: str, /, **values: Any) -> str:
        return say(f"report.{key}", language, **values)

    info = run.info()
    title = words("title", name=info["name"])
    drawn = {name: {theme: _draw(run, name, language, theme) for theme in THEMES} for name in _SECTIONS}
    shown = {
        name: {theme: figure.to_plotly() for theme, figure in both.items()}
        for name, both in drawn.items()
        if not both["light"].empty
    }
    body = [
        *_head(run, info, language, words),
        *_figures(drawn, words),
        *_alerts(run, language, words),
        *_reports(run, language, words),
        *_tensors(run, info, words),
        _facts("config", words("config"), info["config"]),
        _facts("environment", words("environment"), info["environment"]),
    ]
    style = stylesheet() + files("clinometer.view").joinpath("report.css").read_text(encoding="utf-8")
    script = files("clinometer.view").joinpath("report.js").read_text(encoding="utf-8")
    return "\n".join(
        (
            f'<!doctype html>\n{MARK}\n<html lang="{language_value(language, "tag")}">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            # Not a server's header, but enough: the page loads and sends nothing, for any name in it.
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{escape(title)}</title>\n<style>{style}</style></head>",
            "<body>",
            *body,
            f'<script id="figures" type="application/json">{_in_script(shown)}</script>',
            f"<script>{_safe_script()}</script>",
            f"<script>{script}</script>",
            "</body></html>\n",
        )
    )


def _draw(run: RunFile, name: str, language: str, theme: str) -> Figure:
    if name == "map":
        return figures.gradient_map(run, language=language, theme=theme, columns=MAP_COLUMNS)
    return getattr(figures, name)(run, language=language, theme=theme)


def _head(run: RunFile, info: dict[str, Any], language: str, words: Say) -> list[str]:
    first, last = info["first_step"], info["last_step"]
    facts = words("nothing")
    if last is not None:
        facts = words(
            "numbers",
            tensors=f"{info['tensor_count']:,}",
            numel=f"{info['numel']:,}",
            first=f"{first:,}",
            last=f"{last:,}",
        )
    state = words(f"states.{info['state']}")
    if info["since"] is not None:
        state = words("state", state=state, since=_when(info["since"]))
    numbers = ""
    for number in strip(run, language):
        label = " · ".join(part for part in (number["label"], number["unit"]) if part)
        numbers += f"<div><b>{escape(number['text'])}</b><span>{escape(label)}</span></div>"
    lines = [str(info["model"] or ""), ", ".join(map(str, info["optimizers"])), facts, state]
    made = words("made", when=_when(datetime.now(UTC).timestamp()), version=__version__)
    return [
        f"<header><h1>{escape(str(info['name']))}</h1>",
        f"<p>{' · '.join(escape(line) for line in lines if line)}</p>",
        f'<p class="soft">{escape(made)}</p>',
        f'<p class="themes"><button data-set="light">{words("light")}</button>'
        f'<button data-set="dark">{words("dark")}</button></p></header>',
        f'<section class="strip">{numbers}</section>',
    ]


def _figures(drawn: dict[str, dict[str, Figure]], words: Say) -> Iterable[str]:
    for name, both in drawn.items():
        figure = both["light"]
        text = figure.empty or figure.caption
        yield f'<section><h2>{words(name)}</h2><p class="soft">{escape(text)}</p>'
        if not figure.empty:
            height = figure.layout.get("height", 320)
            yield f'<div class="figure" data-figure="{name}" data-height="{int(height)}"></div>'
        yield "</section>"


def _alerts(run: RunFile, language: str, words: Say) -> Iterable[str]:
    found = run.alerts(limit=1_000)
    yield f"<section><h2>{words('alerts')}</h2>"
    if not found:
        yield f'<p class="soft">{words("no_alerts")}</p>'
    for alert in found[:MAX_ALERTS]:
        text, remedy = alert_sentences(alert, language)
        first, until = alert["step"], alert["until"]
        when = words("still_open", first=f"{first:,}")
        if until is not None:
            when = (
                words("step_one", first=f"{first:,}")
                if until == first
                else words("steps", first=f"{first:,}", last=f"{until:,}")
            )
        names = escape(", ".join(map(str, alert["tensors"][:20])))
        yield (
            f'<div class="alert {escape(str(alert["severity"]))}"><b>{escape(text)}</b>'
            f' <span class="soft">{when}</span><br>{escape(remedy)}<br><code>{names}</code></div>'
        )
    if len(found) > MAX_ALERTS:
        yield f"<p>{words('more_alerts', count=len(found) - MAX_ALERTS)}</p>"
    yield "</section>"


def _reports(run: RunFile, language: str, words: Say) -> Iterable[str]:
    """The last diagnosis and the last check."""
    seen: set[str] = set()
    for event in run.events("report", limit=20, newest=True):
        kind = str(event["data"].get("kind", ""))
        if kind in seen:
            continue
        seen.add(kind)
        title = in_language(event["data"].get("title") or kind, language)
        heading = words("report", title=title, step=f"{event['step']:,}")
        text = in_language(event["data"].get("text", ""), language)
        yield f"<section><h2>{escape(heading)}</h2><pre>{escape(text)}</pre></section>"


def _tensors(run: RunFile, info: dict[str, Any], words: Say) -> Iterable[str]:
    tensors = in_order(run.tensors())[:MAX_TENSORS]
    last = info["last_step"]
    if not tensors or last is None:
        return
    ids = [tensor["id"] for tensor in tensors]
    first = max(info["first_step"], last - 99)
    norm, ratio = (
        _recent(run.series(ids, name, first, last, 100)["mean"]) for name in ("grad_norm", "update_ratio")
    )
    names = ("name", "shape", "dtype", "norm", "ratio")
    yield f"<section><h2>{words('tensors')}</h2><div class='wide'><table><tr>"
    yield "".join(f"<th>{words(f'column.{name}')}</th>" for name in names) + "</tr>"
    for tensor, g, u in zip(tensors, norm, ratio, strict=True):
        shape = " × ".join(f"{size:,}" for size in tensor["shape"])
        cells = (tensor["name"], shape, tensor["dtype"], four(g), four(u))
        yield "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>"
    yield "</table></div></section>"


def _recent(values: np.ndarray) -> list[float]:
    """The median of each row's last numbers, NaN for a row without any."""
    found = []
    for row in np.asarray(values, dtype=np.float64):
        seen = row[~np.isnan(row)][-100:]
        found.append(float(np.median(seen)) if len(seen) else float("nan"))
    return found


def _facts(name: str, title: str, facts: Any) -> str:
    text = json.dumps(plain(facts), indent=2, ensure_ascii=False)
    inside = f"<summary>{title}</summary><pre>{escape(text)}</pre>"
    return f'<section><details id="{name}">{inside}</details></section>'


def _when(time: float) -> str:
    return datetime.fromtimestamp(time).astimezone().strftime("%Y-%m-%d %H:%M %Z")


def _in_script(value: Any) -> str:
    """JSON that cannot end its script element, for any name."""
    text = json.dumps(plain(value), allow_nan=False, separators=(",", ":"))  # ASCII: "\u2028" too
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _safe_script() -> str:
    """Plotly's script without text that would end its element."""
    return re.sub(r"</(script)", r"<\\/\1", plotly_script().decode(), flags=re.IGNORECASE)


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return MARK.encode() in file.read(200)
