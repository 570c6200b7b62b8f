"""Live, done, stopped, failed, crashed, empty: told from what the run wrote and from its process."""

import os
import signal
import subprocess
import sys

import pytest

from clinometer.record.format.process import is_alive, this_process
from clinometer.record.read.reader import RunFile
from clinometer.record.read.run_state import QUIET, state_of
from tests.record.running import begun, recorded


@pytest.mark.parametrize("state", ["done", "stopped", "failed"])
def test_a_run_that_ended_says_how(tmp_path, state):
    info = RunFile.open(recorded(tmp_path, 3, state=state)).info()
    assert info["state"] == state
    assert info["since"] > 1.7e9


def test_a_run_whose_process_was_killed_has_crashed_since_its_last_step(tmp_path):
    script = (
        "import os, sys, signal; from pathlib import Path\n"
        "from tests.record.running import begun, statistics\n"
        "r = begun(Path(sys.argv[1]))\n"
        "r.step(1, 123.0, {}, statistics(1, 3))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=os.getcwd())
    assert ended.returncode == -signal.SIGKILL
    run = RunFile.open(tmp_path)
    assert (run.info()["state"], run.info()["since"]) == ("crashed", 123.0)
    recorder = begun(tmp_path, continue_from=1)
    assert run.info()["state"] == "live"
    recorder.close()


def test_a_run_that_never_took_a_step_is_live_while_it_lives_and_empty_afterwards(tmp_path):
    recorder = begun(tmp_path)
    run = RunFile.open(tmp_path)
    assert run.info()["state"] == "live"
    recorder._file.close()
    meta = {"state": "live", "since": 5.0, "process": {**this_process(), "started": -1}}
    assert state_of(meta, [], 10.0) == ("empty", 5.0)


def test_a_number_that_another_process_has_now_is_not_the_writer():
    process = this_process()
    assert is_alive(process) is True
    if sys.platform == "linux":
        assert is_alive({**process, "started": process["started"] - 1}) is False
        assert is_alive({**process, "pid": 1 << 29}) is False
    assert is_alive({**process, "machine": "another/boot/ns"}) is None
    assert is_alive({}) is None


@pytest.mark.parametrize(
    ("times", "now", "expected"),
    [
        ([100.0, 99.0], 100 + QUIET - 1, "live"),
        ([100.0, 99.0], 100 + QUIET + 1, "crashed"),
        ([100.0, 0.0], 100 + 19 * 100, "live"),
        ([100.0, 0.0], 100 + 21 * 100, "crashed"),
        ([], 5 + QUIET - 1, "live"),
        ([], 5 + QUIET + 1, "empty"),
    ],
)
def test_a_run_on_another_machine_is_dead_when_it_is_silent_for_long(times, now, expected):
    meta = {"state": "live", "since": 5.0, "process": {"pid": 1, "started": 1, "machine": "another"}}
    assert state_of(meta, times, now)[0] == expected


def test_a_run_is_replayable_with_settings_and_a_checkpoint(tmp_path):
    recorded(tmp_path, 3)
    run = RunFile.open(tmp_path)
    assert run.info()["replayable"] is False
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert run.info()["replayable"] is False
    (tmp_path / "checkpoints" / "step-00000002" / "state.json").write_text("{}")
    assert run.info()["replayable"] is True
