"""What a reader of a stranger's file may do: answer or refuse in words, in time, within memory, and touch
nothing outside the folder it was given."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clinometer.messages import InputError

SECONDS = 20
MEMORY = 1 << 30
"""What one small file may make a reader take, beyond what the process has already."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "shutil.rmtree",
    "shutil.move",
    "os.chmod",
}
_NEVER = {
    "pickle.find_class",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "ctypes.dlopen",
    "shutil.copyfile",
}

_watching: list[tuple[str, list[str]]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    folder, seen = _watching[-1]
    if event in _NEVER:
        seen.append(f"{event} {arguments!r}"[:300])
    elif event == "open" or event in _CHANGES:
        path = arguments[0]
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITES):
            return
        if isinstance(path, (str, bytes, os.PathLike)):
            whole = os.path.realpath(os.fsdecode(path))
            if not whole.startswith(folder) and whole != "/dev/null" and "__pycache__" not in whole:
                seen.append(f"{event} {whole}")


sys.addaudithook(_hook)


@contextmanager
def within(folder: Path, seconds: float = SECONDS) -> Iterator[None]:
    """Fail when the body writes outside `folder`, starts something, takes too long or too much memory."""

    def too_long(*_: Any) -> None:
        raise AssertionError(f"no answer after {seconds} s of computing")

    seen: list[str] = []
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_taken() + MEMORY, limits[1]))
    before = signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    _watching.append((os.path.realpath(folder), seen))
    try:
        yield
    finally:
        _watching.pop()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    assert seen == []


def _taken() -> int:
    """Bytes of private data the process has now."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    raise AssertionError("no VmData")


def answered(question: Callable[[], object]) -> bool:
    """Whether there was an answer; a refusal must have words in both languages. Anything else is raised."""
    refusal = None
    try:
        question()
    except InputError as error:
        refusal = error
    if refusal is None:
        return True
    for language in ("en", "zh"):
        assert refusal.render(language).strip()
    return False
