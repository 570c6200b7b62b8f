"""Long trials, as processes: `make soak`."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from clinometer.training import checkpoint
from clinometer.training.run_folder import RunFolder
from tests.training.conftest import small

STEPS = 40


def start(run, corpus, *more, steps=STEPS):
    command = [sys.executable, "-m", "clinometer", "train", "--run", str(run)]
    if not (run / "config.toml").exists():
        command += ["--corpus", str(corpus), *small(f"--training.steps={steps}", *more)]
    else:
        command += ["--resume"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out


def rows_of(run):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in RunFolder(run).metrics()]


def assert_same_bytes(a, b):
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = ((checkpoint.checkpoints(p / "checkpoints")[-1] / name).read_bytes() for p in (a, b))
        assert first == second, name
    assert rows_of(a) == rows_of(b)


def wait_for_rows(process, run, count):
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline and len(rows_of(run)) < count:
        time.sleep(0.02)


@pytest.mark.soak
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_run_that_was_stopped_and_resumed_has_the_same_bytes(corpus, tmp_path, precision):
    settings = ["--training.compile=on", f"--training.precision={precision}"]
    finish(start(tmp_path / "whole", corpus, *settings))
    process = start(tmp_path / "stopped", corpus, *settings)
    wait_for_rows(process, tmp_path / "stopped", 15)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == 130
    finish(start(tmp_path / "stopped", corpus))
    assert_same_bytes(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.soak
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(corpus, tmp_path):
    chance = random.Random(0)
    settings = {"steps": 800}
    often = "--training.checkpoint-every=2"
    finish(start(tmp_path / "whole", corpus, often, **settings))
    kills = 0
    process = start(tmp_path / "killed", corpus, often, **settings)
    while kills < 20 and process.poll() is None:
        time.sleep(chance.uniform(0.5, 4.0))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            process = start(tmp_path / "killed", corpus, often, **settings)
    finish(process)
    assert kills >= 3
    assert_same_bytes(tmp_path / "whole", tmp_path / "killed")
