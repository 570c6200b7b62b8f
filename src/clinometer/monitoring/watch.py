"""watch(): every gradient of every step, in two lines.

    watch = watch(model, optimizer, to=sink)
    ...                                          # the loop as it was

It hooks the optimizer's step: it reads gradients before the step and weights after it, and passes a step to
the sinks when the next one begins (the numbers of a GPU have arrived by then, so nothing waits). The run
does not change: not a number, not the random state, no hook on a module or a parameter. The watch holds
model and optimizer weakly, and an error of its own ends the watch with one warning, never the training.
"""

from __future__ import annotations

import atexit
import builtins
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec

import torch
from torch import Tensor

from clinometer.gradients.report.document import Document, to_html, to_text
from clinometer.gradients.report.result import Result, jsonable
from clinometer.gradients.step.explain_step import innermost
from clinometer.messages import InputError, say
from clinometer.monitoring.alert_diagnosis import report_data
from clinometer.monitoring.alerts.watch_summary import summary_of
from clinometer.monitoring.listen import torch_calls
from clinometer.monitoring.sinks import Sink, SinkGroup
from clinometer.monitoring.step import StepWatch

__all__ = ["Sink", "Watch", "watch"]

_NAME = re.compile(r"[a-z0-9_./-]{1,64}")
_living: set[Watch] = set()
_P = ParamSpec("_P")


def watch(
    model: Any,
    optimizer: Any,
    to: Sink | Sequence[Sink],
    every: int = 1,
    *,
    name: str | None = None,
    config: dict[str, Any] | None = None,
) -> Watch:
    """Watch each tensor of `model` (a module, or a mapping of names to tensors) at each step of `optimizer`.

    `optimizer`: one, or several that share the model; of a wrapper (accelerate's) the optimizer inside. A
    step of several is a round in which none steps twice. `to`: where the numbers go. `every`: measure one
    step of so many. `name` and `config` go into the run's description.

    Cost: one pass over gradients, first moments and weights, and a copy of the weights in memory. Of sharded
    tensors (FSDP2, tensor parallel) the numbers are those of the full ones, the same on every rank, for one
    reduction of sums and one of maxima a step; every rank makes the watch, and the first writes. Under DDP
    nothing is exchanged; each rank may watch, and the first writes. Raises InputError if `optimizer`,
    `model` or `to` is not one, and if ranks of a sharded model do not come or watch something else.
    """
    return Watch(model, optimizer, to, every, {"name": name, **(config or {})})


class Watch:
    """A running watch; `close()` ends it and removes every hook."""

    def __init__(
        self, model: Any, optimizer: Any, to: Sink | Sequence[Sink], every: int, config: dict[str, Any]
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise InputError("watch.every", value=every)
        given = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
        if not given:
            raise InputError("watch.no_optimizer")
        optimizers = [innermost(one) for one in given]
        self.closed = False
        self._lock = threading.RLock()
        self._sinks = SinkGroup(to)
        self._steps = StepWatch(model, optimizers, self._sinks, every)
        self._steps.begin(config)
        self._handles = []
        self._depth: dict[int, int] = {}
        """How deep a step is inside a step, by the optimizer's id."""
        self._in_closure = False
        for one in optimizers:
            if not hasattr(one, "register_step_pre_hook"):
                raise InputError("step.not_an_optimizer", type=type(one).__name__)
            self._handles += [
                one.register_step_pre_hook(self._before_step),
                one.register_step_post_hook(self._after_step),
            ]
            weakref.finalize(one, _optimizer_gone, weakref.ref(self)).atexit = False
        torch_calls.listen(self)
        _living.add(self)

    # What a loop may call.

    def log(self, **scalars: Any) -> None:
        """Log numbers of this step, `loss`, `tokens` or any other name of `[a-z0-9_./-]`, at most 64 letters.

        A name that is first logged before any step belongs, each time, to the step that follows; another name
        to the step before. Raises InputError for a name or a value that cannot be recorded.
        """
        for name, value in scalars.items():
            if not _NAME.fullmatch(name):
                raise InputError("watch.scalar_name", name=name)
            if not _is_number(value):
                raise InputError("watch.scalar", name=name, type=type(value).__name__)
        self._call(self._steps.log, scalars)

    def batch(self, identity: dict[str, Any]) -> None:
        """Log which batch the step uses, before or after it as with `log`. An alert records it, so that the
        batch can be found again."""
        self._call(self._steps.log_batch, jsonable(identity))

    def clipped(self, norm: Any, max_norm: float) -> None:
        """Log that the gradients were clipped: the total norm before, and the largest allowed. Not needed for
        torch's clipping or clinometer's, which the watch sees."""
        self._call(self._steps.clipped, norm, float(max_norm))

    def skip(self) -> None:
        """Log that this step is not taken; its gradients are measured and recorded."""
        self._call(self._steps.skip)

    def pin(self, name: str, index: Iterable[int]) -> None:
        """Record every step of one weight in full. Raises InputError for an unknown name or index."""
        self._steps.pins.add(self._steps.roster, name, tuple(index))

    def event(self, kind: str, /, **data: Any) -> None:
        """Record an event: "validation", "checkpoint", "note", …"""
        self._call(self._steps.event, kind, jsonable(data))

    def report(self, result: Result) -> None:
        """Record a diagnosis or a check with the run."""
        self.event("report", **report_data(result))

    @property
    def names(self) -> list[str]:
        """The watched tensors, in the order of their rows."""
        return [one.name for one in self._steps.roster.watched]

    @property
    def step(self) -> int:
        """The number of the last step; set it when a run is resumed."""
        return self._steps.step

    @step.setter
    def step(self, value: int) -> None:
        self._steps.step = int(value)

    @property
    def closure(self) -> Callable[[], Any] | None:
        """Computes the loss of the current batch; if set, a gradient with NaN or Inf is diagnosed with it."""
        return self._steps.closure

    @closure.setter
    def closure(self, value: Callable[[], Any] | None) -> None:
        self._steps.closure = value

    @property
    def on_alert(self) -> Callable[[dict[str, Any]], None] | None:
        """Called with each alert, when it opens, grows and closes."""
        return self._sinks.on_alert

    @on_alert.setter
    def on_alert(self, value: Callable[[dict[str, Any]], None] | None) -> None:
        self._sinks.on_alert = value

    @property
    def alerts(self) -> list[dict[str, Any]]:
        """All alerts so far, as the sinks received them."""
        return self._steps.alerts.all()

    @property
    def sinks(self) -> list[Sink]:
        """Where the numbers go; a sink that failed is no longer among them."""
        return list(self._sinks.sinks)

    def __str__(self) -> str:
        return to_text(self._document(), 100)

    def _repr_html_(self) -> str:
        return to_html(self._document())

    def _document(self) -> Document:
        return summary_of(len(self.names), self.step, self.alerts, self.closed, self._steps.steps_seen)

    def flush(self) -> None:
        """Pass the last step to the sinks now, instead of when the next one begins."""
        self._call(self._steps.flush)

    def close(self, state: str = "done") -> None:
        """Pass the last step on, close the sinks ("done", "stopped" or "failed") and remove every hook."""
        if self.closed:
            return
        self._call(self._steps.flush)
        self._call(self._steps.ends)
        self._end(state)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.close("done" if kind is None else "stopped" if stopped else "failed")

    # What the optimizer's hooks and torch's functions report (listen/torch_calls.py: Listener).

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        # A subclass whose step calls torch's comes here twice: the outer step is the step.
        self._depth[id(optimizer)] = self._depth.get(id(optimizer), 0) + 1
        if self._depth[id(optimizer)] > 1:
            return None
        if closure is None or self.closed:
            self._call(self._steps.before_step, optimizer)
            return None

        def watched() -> Any:
            # The closure computes the gradients of the step; of several calls (LBFGS) the first counts.
            self._in_closure = True
            try:
                value = closure()
            finally:
                self._in_closure = False
            self._call(self._steps.closure_ran, optimizer)
            return value

        self._call(self._steps.before_closure, optimizer)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": watched}
        return (*args[:1], watched, *args[2:]), kwargs

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        self._depth[id(optimizer)] = max(0, self._depth.get(id(optimizer), 0) - 1)
        if self._depth[id(optimizer)]:
            return
        self._call(self._steps.after_step, optimizer)

    def _call(self, handler: Callable[_P, None], *args: _P.args, **kwargs: _P.kwargs) -> None:
        """Run a handler. An exception of ours ends the watching, with one warning; the training goes on."""
        if self.closed:
            return
        try:
            # Two threads may run backward at once; our handlers run one after the other.
            with self._lock, torch.no_grad(), _plain_arithmetic():
                handler(*args, **kwargs)
        except InputError as error:
            self._give_up(str(error), "stopped" if error.key.startswith("watch.ranks.") else "gave_up")
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")

    def backward_begins(self, losses: Sequence[Tensor], given: Any) -> None:
        if not self._in_closure:
            self._depth.clear()  # a step that raised has no end
        self._call(self._steps.backward_begins, losses)

    def backward_failed(self) -> None:
        self._call(self._steps.backward_failed)

    def backward_ended(self, losses: Sequence[Tensor], given: Any) -> None:
        self._call(self._steps.backward_ended, losses, given)

    def clipping(self, grads: Iterable[Tensor], total_norm: Any, max_norm: float) -> None:
        self._call(self._steps.clipping, grads, total_norm, max_norm)

    def clipping_values(self, grads: Iterable[Tensor], largest: float) -> None:
        self._call(self._steps.clipping_values, grads, largest)

    def loss_scaled(self, scaler: Any) -> None:
        self._call(self._steps.loss_scaled, scaler)

    def unscaled(self, optimizer: Any) -> None:
        self._call(self._steps.unscaled, optimizer)

    def scaler_steps(self, scaler: Any, optimizer: Any) -> None:
        self._call(self._steps.scaler_steps, scaler, optimizer)

    def scaler_stepped(self, scaler: Any, optimizer: Any) -> None:
        self._call(self._steps.scaler_stepped, scaler, optimizer)

    def _give_up(self, reason: str, key: str = "gave_up") -> None:
        warnings.warn(say(f"watch.{key}", error=reason), RuntimeWarning, stacklevel=4)
        self._steps.leave(reason)
        self._end("failed")

    def _end(self, state: str) -> None:
        self.closed = True
        self._steps.leave(state)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        torch_calls.leave(self)
        _living.discard(self)
        self._sinks.close(state)
        self._steps.let_go()


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, str | bytes)


class _plain_arithmetic:
    """Autocast off: sums are taken in the precision that we choose."""

    def __enter__(self) -> None:
        self._on = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
        for device in self._on:
            torch.set_autocast_enabled(device, False)

    def __exit__(self, *_: Any) -> None:
        for device in self._on:
            torch.set_autocast_enabled(device, True)


def _optimizer_gone(reference: weakref.ref[Watch]) -> None:
    one = reference()
    if one is not None and not one.closed and not any(one._steps.roster.living()):
        one.close()


def _how_it_ended() -> str:
    """The state of a program that ends now: "done", or "stopped" or "failed" by an exception."""
    if hasattr(sys, "ps1") or hasattr(builtins, "__IPYTHON__"):
        return "done"  # at a prompt an exception ends a line or a cell, and the program goes on
    error = getattr(sys, "last_value", None)
    return "done" if error is None else "stopped" if isinstance(error, KeyboardInterrupt) else "failed"


@atexit.register
def _close_all() -> None:
    for one in list(_living):
        one.close(_how_it_ended())
