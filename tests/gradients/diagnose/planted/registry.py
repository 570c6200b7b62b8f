"""Planted faults: each function builds one broken model, with `# <- here` on the line at fault."""

import fnmatch
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HERE = "# <- here"


@dataclass(frozen=True)
class Planted:
    """One fault and what has to be said about it."""

    name: str
    build: Callable[[], tuple[Any, ...]]
    """Returns params and closure, and perhaps an optimizer."""
    status: str
    cause: str
    names: tuple[str, ...]
    severity: str

    @property
    def line(self) -> int | None:
        """The marked line; None when the fault has no line."""
        lines, start = inspect.getsourcelines(self.build)
        marked = [start + i for i, text in enumerate(lines) if text.rstrip().endswith(HERE)]
        assert len(marked) < 2, f"{self.name} marks two lines"
        return marked[0] if marked else None

    @property
    def file(self) -> str:
        return inspect.getfile(self.build)

    def concerned(self, known: list[str]) -> set[str]:
        return {name for name in known if any(fnmatch.fnmatchcase(name, p) for p in self.names)}


class Registry(list[Planted]):
    def fault(self, status: str, cause: str, *names: str, severity: str = "fault"):
        """Decorates a builder: these names must have this status and cause, at the marked line."""

        def add(build: Callable[[], tuple[Any, ...]]):
            self.append(Planted(build.__name__, build, status, cause, names, severity))
            return build

        return add

    def explained(self, status: str, cause: str, *names: str):
        return self.fault(status, cause, *names, severity="explained")
