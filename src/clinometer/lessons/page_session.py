"""A page's blocks, run in order in one namespace, each from a file of its own in a temporary folder."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from code import InteractiveInterpreter
from pathlib import Path
from types import TracebackType
from typing import Self

from clinometer.lessons.lesson_pages import Code


class PageSession(InteractiveInterpreter):
    """A context manager: the working directory is a temporary folder while it lasts.

    The code of a block is written there under its name before it runs, so that tracebacks and the instrument
    can quote its lines, and a script can be imported by the blocks after it.
    """

    def __init__(self) -> None:
        super().__init__({"__name__": "__main__"})

    def __enter__(self) -> Self:
        self._before, self._bytecode = os.getcwd(), sys.dont_write_bytecode
        # On Windows a file that something still holds cannot be removed: it is left to the system.
        self._holder = tempfile.TemporaryDirectory(prefix="lesson-", ignore_cleanup_errors=True)
        self.folder = Path(os.path.realpath(self._holder.name))
        os.chdir(self.folder)
        sys.path.insert(0, str(self.folder))
        sys.dont_write_bytecode = True  # changed and loaded again within a second, a file is the new one
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        sys.path.remove(str(self.folder))
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(str(self.folder)):
                del sys.modules[name]
        os.chdir(self._before)
        sys.dont_write_bytecode = self._bytecode
        self._holder.cleanup()

    def run(self, code: Code) -> None:
        """Run one block, or write a file; what it raises passes through."""
        path = self.folder / code.file
        path.write_text(code.text, encoding="utf-8")
        if code.is_file:
            importlib.invalidate_caches()
            return
        self.runcode(compile(code.text, str(path), "exec"))

    def showtraceback(self) -> None:
        """Called by runcode where a block raised."""
        raise
