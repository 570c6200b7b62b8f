"""Signals: the first asks for a stop after the step, and no later one costs the checkpoint of it."""

import os
import re
import signal
import subprocess
import sys

import pytest

from clinometer.training.run.stop_signals import StopRequest


def tried(folder, moments):
    """What signalling.py counted, in a process of its own: it signals itself."""
    command = [sys.executable, "-m", "tests.training.signalling", str(folder), str(moments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return {name.strip(): int(number) for name, number in re.findall(r"([^;:]+): (\d+)", done.stdout)}


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_signals_before_while_and_after_a_checkpoint_is_written_leave_whole_ones(tmp_path):
    found = tried(tmp_path, 6)
    assert found.pop("while writing") >= 12
    assert len(found) == 4
    assert all(number == 12 for number in found.values())


@pytest.mark.soak
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_signals_at_hundreds_of_moments_leave_whole_checkpoints(tmp_path):
    found = tried(tmp_path, 100)
    assert found.pop("while writing") >= 200
    assert all(number == 200 for number in found.values())


def test_a_further_sigterm_changes_nothing():
    request = StopRequest()
    for _ in range(3):
        request.ask(signal.SIGTERM)
    assert request.signal is signal.SIGTERM
    request.ask(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        request.ask(signal.SIGINT)


def test_a_second_ctrl_c_stops_at_once_and_a_third_does_not_disturb_what_is_being_closed():
    request = StopRequest()
    request.ask(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        request.ask(signal.SIGINT)
    request.ask(signal.SIGINT)


def test_a_second_ctrl_c_waits_for_a_checkpoint_that_is_being_written():
    request, written = StopRequest(), []

    def write():
        with request.uninterruptible():
            request.ask(signal.SIGINT)
            request.ask(signal.SIGINT)
            written.append(True)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert written == [True]


def test_once_the_run_ends_no_signal_changes_how():
    request = StopRequest()
    request.ask(signal.SIGTERM)
    request.end()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        request.ask(number)
    with request.uninterruptible():
        request.ask(signal.SIGINT)
    assert request.signal is signal.SIGTERM


def test_a_second_ctrl_c_within_the_time_of_an_echo_is_the_first_one():
    request = StopRequest(echo_seconds=3600.0)
    request.ask(signal.SIGINT)
    request.ask(signal.SIGINT)
    assert request.signal is signal.SIGINT
