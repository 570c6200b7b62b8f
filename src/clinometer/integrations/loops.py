"""watch() for any training loop.

    import clinometer
    clinometer.watch(model, optimizer)           # made once, before the loop; the loop stays as it is

It writes a run file that `clinometer view` shows while the training goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from clinometer.distributed.sharded_tensors import rank
from clinometer.messages import InputError, say
from clinometer.monitoring.alerts.alerts import render
from clinometer.monitoring.watch import Sink, Watch
from clinometer.monitoring.watch import watch as watch_into
from clinometer.record.write.new_folder import next_run_folder
from clinometer.record.write.recorder import Recorder

Target = str | PathLike[str] | Sink


def watch(
    model: Any,
    optimizer: Any,
    to: Target | Iterable[Target] | None = None,
    every: int = 1,
    *,
    name: str | None = None,
    config: dict[str, Any] | None = None,
) -> Watch:
    """Record every tensor of `model` at every step of `optimizer`, and report when something goes wrong.

    `model`: a module, or a mapping of names to tensors. `optimizer`: one, or several that share the model.
    `to`: a folder for a new run, a sink (`clinometer.record` has TensorBoard and W&B-shaped ones), or
    several; None makes `runs/SCRIPT-N`. To continue a run, give `Recorder(folder, continue_from=step)`.
    `every`: measure each that many steps. `name` and `config`: what belongs in the
    run's description.

    The returned `Watch` takes what a loop knows and the optimizer does not: `.log(tokens=…)`, `.batch(…)`,
    `.pin(name, index)`; `.close()` ends it, else the end of the program does. Where the run is written and
    each alert are printed to standard error; set `.on_alert` to receive them instead.

    In several processes (torchrun) call it on every rank: numbers are those of the whole tensors, also under
    FSDP2, and the first rank writes the run file.

    Raises InputError: no model, no optimizer, a folder that holds a run already or cannot be written.
    """
    targets = [to] if to is None or isinstance(to, str | PathLike | Sink) else list(to)
    if rank() != 0:  # of several processes that train together the first alone writes a run file
        targets = [target for target in targets if isinstance(target, Sink)]
    sinks = [_sink(target) for target in targets]
    folders = [sink.folder for sink in sinks if isinstance(sink, Recorder)]
    name = name or (folders[0].name if folders else None)
    try:
        one = watch_into(model, optimizer, sinks, every, name=name, config=config)
    except BaseException:
        for sink in sinks:
            if isinstance(sink, Recorder):
                sink.close("failed")
        raise
    if rank() == 0:
        one.on_alert = _Printer()
    for folder in folders:
        print(say("watch.writes", count=len(one.names), folder=folder), file=sys.stderr)
    return one


def _sink(target: Any) -> Any:
    if target is None:
        return Recorder(next_run_folder(_script_name()))
    if isinstance(target, str | PathLike):
        return Recorder(Path(target))
    if isinstance(target, Sink):
        return target
    raise InputError("watch.not_a_sink", type=type(target).__name__)


def _script_name() -> str:
    return Path(sys.argv[0]).stem if sys.argv and sys.argv[0] not in ("", "-", "-c", "-m") else ""


class _Printer:
    """Prints each alert when it opens; the run file records how it grows and closes."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def __call__(self, alert: dict[str, Any]) -> None:
        if alert["id"] not in self._seen:
            self._seen.add(alert["id"])
            print(render(alert), file=sys.stderr)
