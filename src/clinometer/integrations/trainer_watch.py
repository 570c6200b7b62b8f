"""What the callbacks for other trainers share: when a watch begins, continues and ends."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from clinometer.distributed.sharded_tensors import rank
from clinometer.integrations.loops import Target, watch
from clinometer.monitoring.watch import Sink, Watch
from clinometer.record.write.recorder import Recorder


class Watching:
    """A watch that begins when a trainer has put everything in its place, and ends with the training."""

    def __init__(
        self,
        to: Target | Iterable[Target] | None = None,
        every: int = 1,
        *,
        name: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        """`to`, `every`, `name` and `config` are those of `clinometer.watch`. A training that is resumed goes
        on in the folder it is given, and drops what that holds of later steps; without one it begins a run of
        its own."""
        self._to = [to] if isinstance(to, str | PathLike | Sink) else to if to is None else list(to)
        self._every = every
        self._name = name
        self._config = config
        self.watch: Watch | None = None
        """The running watch, from the first step on: `.pin(…)`, `.log(…)`, `.alerts`."""

    def begin(self, model: Any, optimizer: Any, step: int, config: dict[str, Any]) -> None:
        """Watch from after `step`; 0 is a new training."""
        self.end("failed")  # of a training that never came to its end
        to = self._to if self._to is None else [_going_on(target, step) for target in self._to]
        config = config if self._config is None else self._config
        self.watch = watch(model, optimizer, to, self._every, name=self._name, config=config)
        if step:
            self.watch.step = step
            self.watch.event("resumed", step=step)

    def validated(self, loss: Any) -> None:
        """An evaluation gave this loss."""
        if self.watch is not None and loss is not None:
            self.watch.event("validation", loss=float(loss))

    def end(self, state: str = "done") -> None:
        """Close the watch: "done", "stopped" or "failed"."""
        if self.watch is not None:
            self.watch.close(state)


def _going_on(target: Any, step: int) -> Any:
    if not step or not isinstance(target, str | PathLike) or rank() != 0:
        return target
    return Recorder(Path(target), continue_from=step)
