"""kill -9 at any moment, while others read: no committed step is lost and the file opens."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from clinometer.messages import InputError
from clinometer.record.read.reader import RunFile

WRITER = """
import sys
from pathlib import Path
import numpy as np
from clinometer.record.write.recorder import Recorder
from tests.record.running import RUN, named, statistics
folder, done = Path(sys.argv[1]), int(sys.argv[2])
recorder = Recorder(folder, continue_from=done)
recorder.begin(RUN)
recorder.tensors(named(40))
recorder._file.execute("PRAGMA wal_autocheckpoint = 40")
for step in range(done + 1, 1_000_000):
    recorder.step(step, step, {"loss": float(step)}, statistics(step, 40))
    if step % 16 == 0:
        recorder.histograms(step, np.ones((40, 3, 64), np.int64))
    sys.stdout.write(f"{step}\\n")
    sys.stdout.flush()
"""


def kill_while_reading(folder, rounds, seed):
    rng = random.Random(seed)
    done, stop, failures, reads = 0, threading.Event(), [], [0]

    def read():
        while not stop.is_set():
            try:
                run = RunFile.open(folder)
                last = run.info()["last_step"]
                if last is not None:
                    row = run.row(last)
                    # A commit that nobody was told of may come to light late, and is then cut off again.
                    assert row["scalars"]["loss"] == last if row else last == done + 1
                    run.grid("grad_norm")
                    reads[0] += 1
                run.close()
            except InputError as error:
                if error.key not in ("record.missing", "record.no_folder", "record.empty"):
                    failures.append(error)  # before the first start there is nothing to read
            except Exception as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(rounds):
            writer = subprocess.Popen(
                [sys.executable, "-c", WRITER, str(folder), str(done)],
                stdout=subprocess.PIPE,
                cwd=os.getcwd(),
            )
            assert writer.stdout is not None
            told = int(writer.stdout.readline())
            time.sleep(rng.random() * 0.5)
            writer.send_signal(signal.SIGKILL)
            for line in writer.stdout.read().split(b"\n")[:-1]:
                told = int(line)
            writer.wait()
            run = RunFile.open(folder)
            info = run.info()
            assert info["state"] == "crashed"
            assert info["last_step"] in (told, told + 1)
            run.close()
            done = info["last_step"]
    finally:
        stop.set()
        reader.join()
    assert failures == []
    assert reads[0] > 0
    connection = sqlite3.connect(folder / "run.sqlite")
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    run = RunFile.open(folder)
    assert run.rows(limit=1_000_000)["step"].tolist() == list(range(1, done + 1))


def test_no_committed_step_is_lost_when_the_writer_is_killed_three_times(tmp_path):
    kill_while_reading(tmp_path, rounds=3, seed=0)


@pytest.mark.soak
def test_no_committed_step_is_lost_when_the_writer_is_killed_fifty_times(tmp_path):
    kill_while_reading(tmp_path, rounds=50, seed=1)
