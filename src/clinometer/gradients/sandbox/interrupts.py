"""Ctrl-C while the instrument is at work: it passes where the person's code runs, and waits where ours does.

Between two lines of ours a hook may be set and not yet noted, or a weight half put back; KeyboardInterrupt
there would leave it so. So for the length of a public call SIGINT has a handler of ours, which looks at the
stack. If the innermost call that is ours is `theirs`, which calls what is not ours, the signal goes on to
whoever had it before; if not, it is tried again a moment later. One that still waits when the call ends is
passed on then.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar

from clinometer.gradients.sandbox.code_origin import is_instrument
from clinometer.torch_internals.frames import stacks_modes

P = ParamSpec("P")
T = TypeVar("T")

_AGAIN_SECONDS = 0.001


def theirs(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls what is not ours: a closure, a backward. Ctrl-C may pass in there."""
    return call(*args, **kwargs)


def uninterrupted(call: Callable[P, T]) -> Callable[P, T]:
    """Makes a function one whose own lines Ctrl-C does not part: it passes in `theirs`, or at the end."""

    @functools.wraps(call)
    def whole(*args: P.args, **kwargs: P.kwargs) -> T:
        guard = _Guard.begin()
        try:
            return call(*args, **kwargs)
        finally:
            guard.end()

    return whole


def uninterrupted_block(
    block: Callable[P, AbstractContextManager[T]],
) -> Callable[P, AbstractContextManager[T]]:
    """The same for a context manager: Ctrl-C passes in the person's block, not on the way in or out."""

    @functools.wraps(block)
    def whole(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return _Block(block(*args, **kwargs))

    return whole


class _Block(AbstractContextManager[T]):
    def __init__(self, inner: AbstractContextManager[T]) -> None:
        self._inner = inner

    def __enter__(self) -> T:
        self._guard = _Guard.begin()
        try:
            return self._inner.__enter__()
        except BaseException:
            self._guard.end()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            return self._inner.__exit__(kind, error, trace)
        finally:
            self._guard.end()


class _Guard:
    """The handler of SIGINT while the outermost call lasts, in the main thread: no other has signals."""

    _outermost: _Guard | None = None

    def __init__(self, before: Callable[[int, FrameType | None], Any] | None) -> None:
        self._before = before
        self._waits = False
        self._lock = threading.Lock()

    @classmethod
    def begin(cls) -> _Guard:
        """Returns a guard to be ended; in another thread, and inside another call, one that does nothing."""
        before = signal.getsignal(signal.SIGINT)
        if (
            cls._outermost is not None
            or threading.current_thread() is not threading.main_thread()
            or not callable(before)  # ignored, or left to the system: nothing is raised
        ):
            return cls(None)
        guard = cls(before)
        cls._outermost = guard
        try:
            signal.signal(signal.SIGINT, guard._take)
        except BaseException:  # one that came just before
            cls._outermost = None
            raise
        return guard

    def end(self) -> None:
        if self._before is None:
            return
        with self._lock:  # no second try may come between
            if signal.getsignal(signal.SIGINT) == self._take:  # the closure may have set one of its own
                signal.signal(signal.SIGINT, self._before)
            waits, self._waits = self._waits, False
            type(self)._outermost = None
        if waits:
            self._before(signal.SIGINT, None)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if _is_theirs(frame):
            self._waits = False
            if self._before is not None:
                self._before(number, frame)
        elif not self._waits:
            self._waits = True
            _thread.start_new_thread(self._try_again, ())  # threading's own locks may be held just now

    def _try_again(self) -> None:
        while True:
            time.sleep(_AGAIN_SECONDS)
            with self._lock:
                if not self._waits:
                    return
                _thread.interrupt_main()


def _is_theirs(frame: FrameType | None) -> bool:
    """Whether the innermost call of ours is `theirs`, or none is, and torch is not putting a mode away."""
    while frame is not None:
        code, outer = frame.f_code, frame.f_back
        if code is theirs.__code__:
            return True
        if is_instrument(code.co_filename):
            return False
        if code.co_filename == contextlib.__file__ and outer is not None and stacks_modes(outer.f_code):
            return False
        frame = outer
    return True
