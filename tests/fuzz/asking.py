"""A process that puts a reader's questions to a stranger's folder, so that no bomb reaches pytest's own.

`python -m tests.fuzz.asking ROOT` reads a request a line and answers each with a line of JSON. A test calls
`Asking`, which starts it, and once more where an answer has killed it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOM = 512 << 20
SECONDS = 60
"""Of computing, for one question that is measured."""


class Asking:
    """The process that asks the readers of `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._process: subprocess.Popen[str] | None = None

    def ask(self, name: str, folder: Path, only_in: Path | None = None) -> int:
        """How many of its questions reader `name` answers; with `only_in`, within the limits of guard.py.

        Raises AssertionError for whatever is no answer and no refusal in words.
        """
        told = self._answer("ask", name, str(folder), None if only_in is None else str(only_in))
        assert told["outcome"] == "spoke", "\n".join([told["outcome"], *told.get("where", ())])
        return told["answers"]

    def measure(self, name: str, folder: Path) -> dict[str, Any]:
        """What came of it in a child with little room, and how much memory grew."""
        return self._answer("measure", name, str(folder), None)

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _answer(self, *request: str | None) -> dict[str, Any]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.asking", str(self._root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        if line := process.stdout.readline():
            return json.loads(line)
        self._process = None
        return {"outcome": f"died: status {process.wait()}"}


def said(ask: Any, *arguments: Any) -> dict[str, Any]:
    """What came of calling it, whatever that is."""
    try:
        return {"outcome": "spoke", "answers": ask(*arguments)}
    except BaseException as error:
        outcome = f"{type(error).__name__}: {str(error)[:2000]}"
        return {"outcome": outcome, "where": traceback.format_exc().splitlines()[-12:]}


def measured(ask: Any, folder: Path) -> dict[str, Any]:
    """The same in a child whose address space ends `ROOM` further on; with what became resident."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            told = pipe.read()
        _, status = os.waitpid(child, 0)
        return json.loads(told) if told else {"outcome": f"died: status {status}"}
    try:
        os.close(reading)
        with open("/proc/self/clear_refs", "w", encoding="ascii") as refs:
            refs.write("5")  # the high-water mark begins where we are
        before = memory("VmHWM")
        resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + ROOM,) * 2)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        begin = time.process_time()
        told = said(ask, folder)
        told |= {"grew": memory("VmHWM") - before, "seconds": round(time.process_time() - begin, 2)}
        os.write(writing, json.dumps(told, default=str).encode())
    finally:
        os._exit(0)


def memory(field: str) -> int:
    """Bytes of VmHWM (the most that was resident) or VmSize (the address space)."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(f"{field}:"))


def main(root: Path) -> None:
    import torch

    from tests.fuzz import guard, readers

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a reader prints is no answer
    found = {name: reader.ask for name, reader in readers.described(root).items()}
    found |= {
        "takes 200 MiB": lambda folder: len(b"x" * (200 << 20)),
        "takes 1 GiB": lambda folder: b"x" * (1 << 30),
    }

    def within(ask: Any, folder: Path, place: str) -> Any:
        with guard.within(Path(place)):
            return ask(folder)

    for line in sys.stdin:
        what, name, folder, only_in = json.loads(line)
        if what == "measure":
            told = measured(found[name], Path(folder))
        elif only_in is None:
            told = said(found[name], Path(folder))
        else:
            told = said(within, found[name], Path(folder), only_in)
        print(json.dumps(told, default=str), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
