"""kill -9 where and whenever a run changes a file: it resumes to the same bytes, and nothing half counts."""

import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


def killed(folder, what, amount, seed=0, timeout=3600):
    """What killing.py counted."""
    command = [sys.executable, "-m", "tests.training.killing", what, str(folder), str(amount), str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return {name.strip(): int(number) for name, number in re.findall(r"([^;:]+): (\d+)", done.stdout)}


def test_a_run_killed_at_a_tenth_of_its_writes_resumes_and_counts_no_orphan(tmp_path):
    found = killed(tmp_path, "points", 11)
    assert len(found) == 3
    assert all(number >= 2 for number in found.values())


def test_runs_killed_at_five_random_moments_lose_nothing(tmp_path):
    assert killed(tmp_path, "random", 5)["kills"] == 5


@pytest.mark.soak
def test_a_run_killed_at_each_of_its_writes_resumes_and_counts_no_orphan(tmp_path):
    assert sum(killed(tmp_path, "points", 1).values()) > 150


@pytest.mark.soak
def test_runs_killed_at_two_hundred_random_moments_lose_nothing(tmp_path):
    found = killed(tmp_path, "random", 200, seed=1)
    assert found["kills"] == 200
    assert found["shards"] > 0
    assert found["checkpoint"] > 0
