"""A run in a notebook, live: its loss, its alerts and every tensor, below the cell that trains.

watch = clinometer.watch(model, optimizer)
LiveRun(watch)                               # the last line of a cell; then train in the next one
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinometer.integrations.optional_packages import need
from clinometer.messages import InputError, say
from clinometer.monitoring.alerts.alerts import render
from clinometer.monitoring.watch import Watch
from clinometer.record.read.reader import RunFile
from clinometer.record.write.recorder import Recorder

if TYPE_CHECKING:
    import traitlets
    from anywidget import AnyWidget
else:
    AnyWidget = need("anywidget", "notebook").AnyWidget
    traitlets = need("traitlets", "notebook")

POINTS = 400
"""Of the loss curve; a longer one is averaged, as on the page."""
ALERTS = 20
TENSORS = 300

_HERE = Path(__file__).parent / "live"


class LiveRun(AnyWidget):
    """A small live view of one run, from its run file, so that it costs the training nothing.

    `run`: a folder, or the `Watch` that writes it. It is read again every `seconds`, by a thread that ends
    with the run or with `.close()`; `.refresh()` reads it now. `shown` is what the page draws, plain data.

    Raises InputError: no run there, or a watch that writes no run file.
    """

    _esm = _HERE / "live.js"
    _css = _HERE / "live.css"
    shown: Any = traitlets.Dict().tag(sync=True)

    def __init__(self, run: str | PathLike[str] | Watch, seconds: float = 1.0) -> None:
        super().__init__()
        self._file = RunFile.open(_folder(run))
        self._seen: Any = None
        self._over = threading.Event()
        self.refresh()
        if self.shown["live"]:
            threading.Thread(target=self._follow, args=(seconds,), daemon=True).start()

    def refresh(self) -> None:
        """Read what is new in the run file."""
        version = self._file.version()
        if version != self._seen:
            self.shown = _read(self._file)
            self._seen = version

    def close(self) -> None:
        """Remove the view and close the file."""
        self._over.set()
        self._file.close()
        super().close()

    def _follow(self, seconds: float) -> None:
        with contextlib.suppress(InputError):  # the file is gone, or the view was closed while it was read
            while not self._over.wait(seconds):
                self.refresh()
                if not self.shown["live"]:
                    return


def _folder(run: str | PathLike[str] | Watch) -> Path:
    if not isinstance(run, Watch):
        return Path(run)
    run.flush()
    for sink in run.sinks:
        if isinstance(sink, Recorder):
            return sink.folder
    raise InputError("integrations.no_run_file")


def _read(file: RunFile) -> dict[str, Any]:
    info = file.info()
    last = info["last_step"]
    row = None if last is None else file.row(last)
    alerts = file.alerts(limit=ALERTS)
    return {
        "title": info["name"],
        "live": info["state"] == "live",
        "facts": _facts(info, {} if row is None else row["scalars"]),
        "loss": _loss(file),
        "loss_label": say("live.loss"),
        "alerts": [
            {"text": render(alert), "open": alert["until"] is None, "severity": alert["severity"]}
            for alert in reversed(alerts)
        ],
        "tensors": _tensors(file.tensors(), [] if row is None else row["statistics"], info["statistics"]),
    }


def _facts(info: dict[str, Any], scalars: dict[str, float]) -> list[str]:
    facts = [say(f"record.state.{info['state']}"), say("live.step", step=info["last_step"] or 0)]
    if "loss" in scalars:
        facts.append(f"{say('live.loss')} {_number(scalars['loss'])}")
    if scalars.get("seconds") and scalars.get("tokens"):
        facts.append(say("live.speed", speed=scalars["tokens"] / scalars["seconds"]))
    facts.append(say("live.alerts", count=info["alert_count"]))
    return facts


def _loss(file: RunFile) -> dict[str, list[Any]]:
    if "loss" not in file.scalar_names():
        return {"step": [], "value": []}
    curve = file.scalars(["loss"], points=POINTS)
    return {"step": curve["step"].tolist(), "value": [_plain(value) for value in curve["loss"]["mean"]]}


def _tensors(tensors: list[dict[str, Any]], statistics: Iterable[Any], names: list[str]) -> dict[str, Any]:
    """The last step, a row a tensor: gradient norm, share of zeros, weight norm, update / weight."""
    at = {name: column for column, name in enumerate(names)}
    rows = []
    for tensor, values in zip(tensors[:TENSORS], statistics, strict=False):
        weight, update = float(values[at["weight_norm"]]), float(values[at["update_norm"]])
        numbers = [float(values[at["grad_norm"]]), float(values[at["grad_zeros"]]), weight]
        numbers.append(update / weight if weight else math.nan)
        rows.append([tensor["name"], *map(_number, numbers)])
    columns = [say(f"live.column.{name}") for name in ("tensor", "gradient", "zeros", "weight", "ratio")]
    more = len(tensors) - len(rows)
    return {"columns": columns, "rows": rows, "more": say("live.more", count=more) if rows and more else ""}


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"
