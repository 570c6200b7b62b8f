"""Places in the user's code: found by walking frames; the source line is read when it is shown."""

from __future__ import annotations

import inspect
import linecache
import sys
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, NamedTuple

from clinometer.gradients.sandbox.code_origin import is_machinery

_COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>")


class Frame(NamedTuple):
    """One call on the stack."""

    file: str
    line: int
    function: str


@dataclass(frozen=True)
class Where:
    """A line of the user's code, what it called, and how it was reached."""

    file: str
    line: int
    function: str = ""
    """Qualified: "Encoder.forward"."""
    op: str = ""
    """The operation, as a person would write it: "detach"."""
    module: str = ""
    """Dotted path of the module that was running."""
    stack: tuple[Frame, ...] = ()
    """The user's calls, outermost first; the last one is this place."""

    @property
    def source(self) -> str:
        """The line as written, stripped; "" if it is not available (exec'd text, a closed shell)."""
        if self.file == "<string>":  # also what 3.13 keeps the text of `python -c` under, whoever else exec's
            return ""
        return linecache.getline(self.file, self.line).strip()

    @property
    def label(self) -> str:
        """File and line, short: "model.py:41"."""
        parts = self.file.replace("\\", "/").split("/")
        name = parts[-1]
        if len(parts) > 1 and parts[-2].startswith("ipykernel_"):
            name = "<cell>"
        elif name == "__init__.py" and len(parts) > 1:
            name = f"{parts[-2]}/{name}"
        return f"{name}:{self.line}"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "file": self.file,
            "line": self.line,
            "function": self.function,
            "op": self.op,
            "module": self.module,
            "source": self.source,
            "stack": [frame._asdict() for frame in self.stack],
        }


def user_frame(frame: FrameType | None = None, *, op: str = "", module: str = "") -> Where | None:
    """The innermost line, from `frame` (default: the caller) outwards, that is the user's code.

    Torch, the standard library and the instrument are not; other installed packages are, for a model
    from a library has its faults there. None when no frame is the user's.
    """
    frame = frame or sys._getframe(1)
    stack: list[Frame] = []
    while frame is not None:
        code = frame.f_code
        if not is_machinery(code.co_filename):
            stack.append(Frame(code.co_filename, frame.f_lineno or 0, _name_of(code)))
            if code.co_name in _COMPREHENSIONS and frame.f_back is not None:
                frame = frame.f_back  # from 3.12 on it is no call of its own
        frame = frame.f_back
    if not stack:
        return None
    file, line, function = stack[0]
    return Where(file, line, function, op, module, tuple(reversed(stack)))


def user_line_of(error: BaseException) -> Where | None:
    """The innermost line of the user's code that an exception passed; None if there is none."""
    trace, where = error.__traceback__, None
    while trace is not None:
        code = trace.tb_frame.f_code
        if not is_machinery(code.co_filename):
            name = _name_of(code)
            frame = Frame(code.co_filename, trace.tb_lineno, name)
            where = Where(frame.file, frame.line, name, "", "", (frame,))
        trace = trace.tb_next
    return where


def _name_of(code: CodeType) -> str:
    """The qualified name as a person writes it; of a comprehension, that of the function it stands in."""
    name = code.co_qualname
    if code.co_name in _COMPREHENSIONS:
        name = name.rpartition(code.co_name)[0].removesuffix(".<locals>.") or "<module>"
    return name.rpartition("<locals>.")[2]


def runs_machinery(frame: FrameType) -> bool:
    """Whether a frame is torch's, the standard library's or the instrument's."""
    return is_machinery(frame.f_code.co_filename)


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
    name = _name_of(code)
    return Where(code.co_filename, line, name, code.co_name, "", (Frame(code.co_filename, line, name),))
