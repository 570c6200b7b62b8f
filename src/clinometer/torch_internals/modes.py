"""The stack of modes that see every function of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from clinometer.torch_internals.look_up import look_up

_stack: Any = look_up("overrides._get_current_function_mode_stack")
_push: Any = look_up("overrides._push_mode")
_pop: Any = look_up("overrides._pop_mode")


@contextmanager
def modes_aside(aside: Callable[[Any], bool]) -> Iterator[None]:
    """Inside, the modes that `aside` names see nothing; afterwards the stack is what it was."""
    stack = _stack() if _stack and _push and _pop else []
    if not any(map(aside, stack)):
        yield
        return
    others = [mode for mode in stack if not aside(mode)]
    _replace(stack, others)
    try:
        yield
    finally:
        _replace(others, stack)


def _replace(before: list[Any], after: list[Any]) -> None:
    for _ in before:
        _pop()
    for mode in after:
        _push(mode)
