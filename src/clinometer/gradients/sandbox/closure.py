"""The closure: called, judged, and called again with the same random numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients.sandbox.interrupts import theirs
from clinometer.gradients.sandbox.random_state import RandomState
from clinometer.messages import InputError
from clinometer.torch_internals.frames import compiler_is_loaded

Closure = Callable[[], Any]


def evaluate(closure: Closure, *, as_called: bool = False) -> Tensor:
    """The loss `closure` returns, computed with autograd on: one real floating-point number.

    `as_called`: with autograd on or off as it is where the caller stands.

    A mapping or an object with a `loss`, as transformers' models return, stands for that loss.
    Raises InputError, saying what came, for anything else. A loss without a graph is returned.
    """
    if isinstance(closure, Tensor):
        raise InputError("gradients.closure.loss_given")
    if not callable(closure):
        raise InputError("gradients.closure.not_callable", type=type(closure).__name__)
    torch.clear_autocast_cache()  # under the caller's autocast, values changed since would not be seen
    with ExitStack() as modes:
        if not as_called:
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.enable_grad())
        came = theirs(closure)
    loss = came
    if not isinstance(came, Tensor):
        loss = came.get("loss") if isinstance(came, Mapping) else getattr(came, "loss", None)
    if not isinstance(loss, Tensor):
        raise _not_a_loss(came)
    if loss.is_meta:
        raise InputError("gradients.closure.meta")
    if loss.numel() != 1:
        raise InputError("gradients.closure.vector", shape=list(loss.shape))
    if loss.is_complex():
        raise InputError("gradients.closure.complex", dtype=loss.dtype)
    if not loss.is_floating_point():
        raise InputError("gradients.closure.integer", dtype=loss.dtype)
    return loss


def replay(closure: Closure) -> Callable[[], Tensor]:
    """`evaluate(closure)` as a function that draws, at every call, the random numbers that come next now."""
    state = RandomState()

    def again() -> Tensor:
        state.restore()
        return evaluate(closure)

    return again


@contextmanager
def eagerly() -> Iterator[None]:
    """Inside, what torch.compile made runs as the Python it was made from, so lines and hooks are real."""
    if not compiler_is_loaded():  # nothing was compiled; importing it would cost a second
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        # Our hooks on every module, which here run no compiled code twice.
        warnings.filterwarnings(
            "ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks"
        )
        yield


def _not_a_loss(came: Any) -> InputError:
    kind = type(came).__name__
    if came is None:
        return InputError("gradients.closure.none")
    if isinstance(came, bool | int | float):
        return InputError("gradients.closure.plain_number", type=kind, value=came)
    if isinstance(came, Mapping) or hasattr(came, "loss"):
        keys = ", ".join(map(str, came)) if isinstance(came, Mapping) else "loss"
        return InputError("gradients.closure.no_loss", type=kind, keys=keys)
    if isinstance(came, tuple | list):
        return InputError("gradients.closure.tuple", type=kind, count=len(came))
    return InputError("gradients.closure.kind", type=kind)
