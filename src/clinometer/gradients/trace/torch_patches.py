"""Wrapping torch's functions: one stack a function, whoever listens to it and in whatever order they leave.

`patched(owner, name, around)` puts `around` in the way of every call of `owner.name`. The original is wrapped
once, by the first user, and comes back with the last; who enters and leaves between does not matter. If
somebody else wraps the function on top of ours meanwhile, theirs stays: ours passes calls through as soon as
nobody listens, and is taken out by the next user after theirs is gone.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
    """Puts back what was there, unless somebody listens, or somebody else's wrapper lies on top."""
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
