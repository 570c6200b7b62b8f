"""The run file: everything that was watched, in one SQLite file a run (docs/en/run-file.md).

`from clinometer.record import Recorder, RunFile, TensorBoard, Tracker`: the writer, the reader, and two
other places for the same numbers. The names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clinometer.record.out.trackers import TensorBoard as TensorBoard
    from clinometer.record.out.trackers import Tracker as Tracker
    from clinometer.record.read.reader import RunFile as RunFile
    from clinometer.record.write.recorder import Recorder as Recorder

_HOME = {
    "Tracker": "clinometer.record.out.trackers",
    "Recorder": "clinometer.record.write.recorder",
    "RunFile": "clinometer.record.read.reader",
    "TensorBoard": "clinometer.record.out.trackers",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'clinometer.record' has no attribute {name!r}")
