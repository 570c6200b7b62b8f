"""What a stranger's small file may cost: not more than a share of itself, whatever it claims to be.

Each bomb is read in a child process whose address space ends 512 MiB beyond what it has; how much became
resident is the system's own figure.
"""

import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback

import pytest

from tests.fuzz.bombs import BOMBS

ROOM = 512 << 20
SECONDS = 60
"""Of computing."""
BASE, FACTOR = 64 << 20, 50
"""What reading may take: a JSON list of short texts is some fifty times its file in Python."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measured with Linux's /proc")


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_read_or_refused_in_words_within_a_share_of_its_size(made, tmp_path, name):
    reader, make = BOMBS[name]
    folder = tmp_path / "folder"
    shutil.copytree(made[reader].good, folder)
    all_answers = made[reader].ask(folder)  # and whatever the first use imports is no bomb's
    assert all_answers > 0
    make(folder)
    made[reader].seal(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    told = measured(made[reader].ask, folder)
    assert told["outcome"] == "spoke", told
    assert told["grew"] < BASE + FACTOR * size, told


def test_the_measure_sees_what_is_taken(tmp_path):
    told = measured(lambda folder: len(b"x" * (200 << 20)), tmp_path)
    assert told["outcome"] == "spoke"
    assert 196 << 20 <= told["grew"] < 232 << 20  # the system counts in lots
    assert measured(lambda folder: b"x" * (1 << 30), tmp_path)["outcome"] == "MemoryError: "


def measured(ask, folder):
    """What came of asking, in a child with little room."""
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
        try:
            said = {"outcome": "spoke", "answers": ask(folder)}
        except BaseException as error:  # whatever it is, the parent is to hear of it
            said = {"outcome": f"{type(error).__name__}: {str(error)[:200]}"}
            said["where"] = traceback.format_exc().splitlines()[-12:]
        said |= {"grew": memory("VmHWM") - before, "seconds": round(time.process_time() - begin, 2)}
        os.write(writing, json.dumps(said, default=str).encode())
    finally:
        os._exit(0)


def memory(field):
    """Bytes of VmHWM (the most that was resident) or VmSize (the address space)."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(f"{field}:"))
