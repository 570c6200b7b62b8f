"""Where a function is written."""

from __future__ import annotations

import inspect
from typing import Any

from clinometer.gradients.report.places import Frame, Where


def definition_of(function: Any) -> Where | None:
    """The line with `def` of a Python function; None for one written in C."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    line = code.co_firstlineno
    try:
        lines, start = inspect.getsourcelines(code)
    except (OSError, TypeError):
        lines, start = [], line
    for offset, text in enumerate(lines):
        if text.lstrip().startswith(("def ", "async def ")):
            line = start + offset
            break
    name = code.co_qualname.rpartition("<locals>.")[2]
    return Where(code.co_filename, line, name, code.co_name, "", (Frame(code.co_filename, line, name),))
