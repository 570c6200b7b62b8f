"""Calls that no TorchFunctionMode sees: of custom autograd Functions, nn.Parameter and inference_mode.

Of custom Functions: whether one runs now, and a listener around each `apply`. torch has no hook for them, and
since 2.14 `apply` is built in: it leaves no frame on the stack. So what torch calls is wrapped for a while
(`torch_patches`): `Function.apply`, and the `forward` and `setup_context` of every class, because
`fast = MyFunction.apply`, made before, is not looked up again. Reentrant checkpoints are exempt: what runs
inside one is the model itself.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.nn.modules import module as module_hooks

from clinometer.gradients.trace.torch_patches import in_this_thread, patch, patched
from clinometer.torch_internals.custom_functions import BACKWARD_CALLS, BackwardNode, CheckpointFunction

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
    _put_back.append(patch(Function, "apply", _around_apply))
    for name in BACKWARD_CALLS:
        _put_back.append(patch(BackwardNode, name, _counted))
    for kind in _subclasses(Function):
        if kind is not CheckpointFunction:
            for name in {"forward", "setup_context"} & vars(kind).keys():
                _put_back.append(patch(kind, name, _counted))


def _around_apply(apply: Callable[..., Any], cls: Any, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():  # the compiler goes through here in the place of the user's call
        return apply(cls, *args, **kwargs)
    call = functools.partial(apply, cls)
    if cls is not CheckpointFunction:
        call = functools.partial(_counted, call)
    here = threading.get_ident()
    for thread, listener in _listeners:
        if thread == here:
            call = functools.partial(_told, listener, cls, call)
    return call(*args, **kwargs)


def _told(listener: Listener, cls: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return listener(cls, call, args, kwargs)


def _counted(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The call, counted as running while it does."""
    if torch.compiler.is_compiling():
        return call(*args, **kwargs)
    _running.depth += 1
    try:
        return call(*args, **kwargs)
    finally:
        _running.depth -= 1


def _subclasses(kind: type) -> Iterator[type]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)


@contextmanager
def seen_calls(
    function: Callable[[Any, Callable[[], Any], tuple[Any, ...]], Any],
    parameter: Callable[[Any, torch.Tensor], None],
    modules: list[nn.Module],
    inference: Callable[[bool], None],
) -> Iterator[None]:
    """Inside, `Function.apply`, `nn.Parameter(…)` and `inference_mode` of this thread are reported.

    `function(class, call, arguments)` returns what `call()` does; `modules` lists the modules that run now,
    the innermost last; `inference` is told of entering (True) and of leaving. One at a time: `untouched`
    holds the lock.
    """
    here = threading.get_ident()

    def seen_apply(cls: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return function(cls, lambda: call(*args, **kwargs), args)

    def around_parameter(call: Any, cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        made = call(cls, data, requires_grad)
        parameter(data, made)
        return made

    def around_enter(call: Any, mode: Any) -> None:
        before = torch.is_grad_enabled()
        call(mode)
        if before and not torch.is_grad_enabled():
            inference(True)

    def around_leave(call: Any, mode: Any, *error: Any) -> None:
        before = torch.is_grad_enabled()
        call(mode, *error)
        if torch.is_grad_enabled() and not before:
            inference(False)

    def before_forward(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == here:
            modules.append(module)

    def after_forward(module: nn.Module, args: Any, output: Any) -> None:
        while threading.get_ident() == here and modules and modules.pop() is not module:
            pass  # a forward that raised, caught by the user's code

    with ExitStack() as stack:
        stack.callback(modules.clear)
        stack.callback(module_hooks.register_module_forward_pre_hook(before_forward).remove)
        stack.callback(module_hooks.register_module_forward_hook(after_forward, always_call=True).remove)
        stack.enter_context(function_calls(seen_apply))
        for owner, name, around in (
            (nn.Parameter, "__new__", around_parameter),
            (torch.inference_mode, "__enter__", around_enter),
            (torch.inference_mode, "__exit__", around_leave),
        ):
            stack.enter_context(patched(owner, name, in_this_thread(around)))
        yield
