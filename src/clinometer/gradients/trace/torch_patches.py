"""Wrapping torch's functions: one stack a function, with any number of users in any order.

`patched(owner, name, around)` puts `around` in the way of every call of `owner.name`. The original is wrapped
once, by the first user, and comes back with the last, in whatever order they leave. If another library
wraps the function on top of ours meanwhile, its wrapper stays: ours passes calls through once it has no user,
and the next user takes it out after the other wrapper is gone. `seen_calls` uses it for what a
TorchFunctionMode does not see.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.nn.modules import module as module_hooks

Around = Callable[..., Any]
"""around(call, *args, **kwargs) → the result, usually call(*args, **kwargs). Of a method, `args` begin with
self (or the class), and `call` takes it too."""

_lock = threading.RLock()
_LAYER = "_clinometer_layer"
"""The attribute of a wrapper that holds its layer: a list of layers could outlive them."""


def patch(owner: Any, name: str, around: Around) -> Callable[[], None]:
    """Puts `around` in the way of `owner.name`, a module's function or a class's method, for all threads.

    The latest is the outermost. Returns a function that takes it out; calling that twice does no harm. If
    this torch has no such attribute, nothing happens.
    """
    with _lock:
        _take_out_idle(owner, name)
        layer = _on_top(owner, name) or _put_on_top(owner, name)
        if layer is None:
            return lambda: None
        entry = (around,)
        layer.entries = (*layer.entries, entry)

    def remove() -> None:
        with _lock:
            layer.entries = tuple(other for other in layer.entries if other is not entry)
            _take_out_idle(owner, name)

    return remove


@contextmanager
def patched(owner: Any, name: str, around: Around) -> Iterator[None]:
    """`patch` for the length of a with-block."""
    remove = patch(owner, name, around)
    try:
        yield
    finally:
        remove()


def in_this_thread(around: Around) -> Around:
    """Returns `around` for calls of the thread that asks now; those of other threads pass through."""
    here = threading.get_ident()

    def only_here(call: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != here:
            return call(*args, **kwargs)
        return around(call, *args, **kwargs)

    return only_here


class _Layer:
    """One wrapper, what it stands in for, and what stands around its calls now."""

    def __init__(self, replaced: Any, inherited: bool) -> None:
        self.replaced = replaced
        self.inherited = inherited
        self.entries: tuple[tuple[Around], ...] = ()
        call = _unbound(replaced)

        @functools.wraps(call)
        def passing(*args: Any, **kwargs: Any) -> Any:
            inner = call
            for (around,) in self.entries:
                inner = functools.partial(around, inner)
            return inner(*args, **kwargs)

        setattr(passing, _LAYER, self)
        self.wrapper: Any = passing
        if isinstance(replaced, classmethod | types.ClassMethodDescriptorType):
            self.wrapper = classmethod(passing)
        elif isinstance(replaced, staticmethod):
            self.wrapper = staticmethod(passing)


def _on_top(owner: Any, name: str) -> _Layer | None:
    """Returns the layer that a call of the attribute comes to first; None if that is not one of ours."""
    own = vars(owner).get(name)
    layer = getattr(getattr(own, "__func__", own), _LAYER, None)
    return layer if layer is not None and layer.wrapper is own else None  # functools.wraps copies attributes


def _put_on_top(owner: Any, name: str) -> _Layer | None:
    """Wraps what is there; returns None if there is no such attribute."""
    places = owner.__mro__ if isinstance(owner, type) else (owner,)
    replaced = next((vars(place)[name] for place in places if name in vars(place)), None)
    if replaced is None:
        return None
    layer = _Layer(replaced, inherited=name not in vars(owner))
    setattr(owner, name, layer.wrapper)
    return layer


def _take_out_idle(owner: Any, name: str) -> None:
    """Puts back what was there, unless our wrapper has users, or a wrapper of another library lies on top."""
    while (layer := _on_top(owner, name)) is not None and not layer.entries:
        if layer.inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, layer.replaced)


def _unbound(replaced: Any) -> Callable[..., Any]:
    """Returns the function of a method, which takes self or the class as its first argument."""
    if isinstance(replaced, types.ClassMethodDescriptorType):  # written in C: only bound can it be called
        return lambda cls, *args, **kwargs: replaced.__get__(None, cls)(*args, **kwargs)
    return getattr(replaced, "__func__", replaced)


@contextmanager
def seen_calls(
    function: Callable[[Any, Callable[[], Any], tuple[Any, ...]], Any],
    parameter: Callable[[Any, torch.Tensor], None],
    modules: list[nn.Module],
    inference: Callable[[bool], None],
) -> Iterator[None]:
    """Inside, `Function.apply`, `nn.Parameter(…)` and `inference_mode` of this thread are reported.

    `function(class, call, arguments)` returns what `call()` does; `modules` lists the modules that run now,
    the innermost last; `inference(True)` is called on entering, `inference(False)` on leaving. One at a
    time: `untouched` holds the lock.
    """
    here = threading.get_ident()

    def around_apply(call: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
        return function(cls, lambda: call(cls, *args, **kwargs), args)

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
        for owner, name, around in (
            (Function, "apply", around_apply),
            (nn.Parameter, "__new__", around_parameter),
            (torch.inference_mode, "__enter__", around_enter),
            (torch.inference_mode, "__exit__", around_leave),
        ):
            stack.enter_context(patched(owner, name, in_this_thread(around)))
        yield
