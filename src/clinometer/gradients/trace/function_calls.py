"""Calls of custom autograd Functions: whether one runs now, and a listener around each `apply`.

torch has no hook for them, a TorchFunctionMode does not see them, and since 2.14 `apply` is built in: it
leaves no frame on the stack. So what torch calls is wrapped for a while: `Function.apply`, and the `forward`
and `setup_context` of every class, because `fast = MyFunction.apply`, made before, is not looked up again.
Reentrant checkpoints are exempt: what runs inside one is the model itself.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import Function

from clinometer.torch_internals.custom_functions import BACKWARD_CALLS, BackwardNode, CheckpointFunction
from clinometer.torch_internals.look_up import replace

Listener = Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""(class, its apply, arguments, keyword arguments) → the result, which it gets from apply."""


class _Running(threading.local):
    depth = 0
    """How many calls into custom Functions this thread is inside of."""


_running = _Running()
_lock = threading.RLock()
_standing = 0
_listeners: list[tuple[int, Listener]] = []
"""Who listens, by thread; the latest is asked first."""
_put_back: list[Callable[[], None]] = []


@contextmanager
def function_calls(listener: Listener | None = None) -> Iterator[None]:
    """Inside, `in_custom` is right, and `listener` is called for each `Function.apply` of this thread.

    The wrappers are the process's, and stand until the last one leaves; what other threads call goes through
    them unseen. Without a listener, entering while they stand costs nothing.
    """
    global _standing
    entry = (threading.get_ident(), listener)
    with _lock:
        if not _standing:
            _wrap_all()
        _standing += 1
        if listener is not None:
            _listeners.append(entry)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        with _lock:
            if listener is not None:
                _listeners.remove(entry)  # pyright: ignore[reportArgumentType]
            _standing -= 1
            if not _standing:
                while _put_back:
                    _put_back.pop()()


def in_custom() -> bool:
    """Whether a custom autograd Function is running: there, gradients are off and everything counts."""
    return _running.depth > 0


def _wrap_all() -> None:
    _put_back.append(replace(Function, "apply", lambda apply: classmethod(_apply_of(apply))))
    for name in BACKWARD_CALLS:
        _put_back.append(replace(BackwardNode, name, _counted))
    for kind in _subclasses(Function):
        if kind is not CheckpointFunction:
            for name in {"forward", "setup_context"} & vars(kind).keys():
                _put_back.append(replace(kind, name, _counted_method))


def _counted_method(own: Any) -> Any:
    as_found = classmethod if isinstance(own, classmethod) else staticmethod
    function: Any = getattr(own, "__func__", own)
    return as_found(_counted(function))


def _apply_of(apply: Any) -> Callable[..., Any]:
    def seen_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        call = apply.__get__(None, cls)
        if torch.compiler.is_compiling():  # the compiler goes through here in the place of the user's call
            return call(*args, **kwargs)
        if cls is not CheckpointFunction:
            call = _counted(call)
        here = threading.get_ident()
        for thread, listener in _listeners:
            if thread == here:
                call = functools.partial(_told, listener, cls, call)
        return call(*args, **kwargs)

    return seen_apply


def _told(listener: Listener, cls: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return listener(cls, call, args, kwargs)


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, counted as running while it does; the signature is the same, for torch reads it."""

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        _running.depth += 1
        try:
            return function(*args, **kwargs)
        finally:
            _running.depth -= 1

    return counted


def _subclasses(kind: type) -> Iterator[type]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)
