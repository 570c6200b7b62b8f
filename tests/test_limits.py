"""Whatever hangs or dies, a run of tests ends, with a summary that names it."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = re.search(r"^TEST_FLAGS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
"""How `make test` calls pytest."""

HANGS = """
import time, pytest
@pytest.fixture
def slow_thing(): time.sleep(3600)
@pytest.mark.timeout(2)
def test_that_hangs(): time.sleep(3600)
@pytest.mark.timeout(2)
def test_whose_fixture_hangs(slow_thing): pass
def test_after(): pass
"""
DIES = """
import os
def test_before(): pass
def test_that_dies(): os._exit(3)
def test_behind(): pass
"""
BLOCKS = """
import pytest, signal, time
@pytest.mark.timeout(1)
def test_that_listens_to_no_signal():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(3600)
def test_next(): pass
"""
LONG = """
import time, pytest
@pytest.mark.timeout(0)
def test_that_takes_too_long(): time.sleep(3600)
"""


def run(folder, *flags, **files):
    """(exit code, output) of pytest on these files, with the flags of `make test`."""
    assert FLAGS is not None
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -q\n")
    # As a background job of a shell is begun.
    ignore = "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    ignore += "os.execv(sys.argv[1], sys.argv[1:])"
    plugins = [f"-p{name}" for name in ("xdist", "pytest_timeout", "tests.limits", "no:cacheprovider")]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            ignore,
            sys.executable,
            "-m",
            "pytest",
            *plugins,
            *FLAGS[1].split(),
            *flags,
            ".",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    return done.returncode, done.stdout + done.stderr


def test_a_test_that_hangs_fails_with_its_stack_and_the_others_are_run(tmp_path):
    code, out = run(tmp_path, hangs=HANGS)
    assert code == 1, out
    assert "FAILED test_hangs.py::test_that_hangs" in out
    assert "ERROR test_hangs.py::test_whose_fixture_hangs" in out
    assert "def slow_thing(): time.sleep(3600)" in out
    assert "1 failed, 1 passed, 1 error" in out


def test_a_worker_that_dies_is_replaced_and_its_test_is_named(tmp_path):
    code, out = run(tmp_path, dies=DIES, again=DIES, last=DIES)
    assert code == 1, out
    for name in ("dies", "again", "last"):
        assert f"crashed while running 'test_{name}.py::test_that_dies'" in out
    assert "3 failed, 6 passed" in out


def test_a_worker_that_listens_to_no_signal_is_ended_with_its_stack(tmp_path):
    code, out = run(tmp_path, "-o", "faulthandler_timeout=4", blocks=BLOCKS)
    assert code == 1, out
    assert "in test_that_listens_to_no_signal" in out
    assert "crashed while running 'test_blocks.py::test_that_listens_to_no_signal'" in out
    assert "1 failed, 1 passed" in out


def test_a_run_that_takes_too_long_ends_and_names_what_was_running(tmp_path):
    for seconds in (3, 12, 60, 300):  # on a busy machine the workers need a while to begin
        code, out = run(tmp_path, f"--run-limit={seconds}", long=LONG, dies=DIES)
        assert code == 2, out
        assert f"the run took longer than {seconds} s" in out
        assert not re.search(r"still running .*test_that_dies", out), out
        if re.search(r"still running after \d+ s: test_long.py::test_that_takes_too_long", out):
            return
    raise AssertionError(out)
