"""A disk that is full or read-only, while a run is written: training goes on, and what was saved is whole."""

import os
import shutil
import subprocess
import sys
from functools import cache

import pytest

from clinometer.training.run.json_lines import JsonLines
from clinometer.training.run.run_folder import RunFolder
from tests.training.conftest import SMALL, assert_refused


@cache
def without_mounts() -> str:
    """Why this machine cannot give a test disks of its own; empty if it can."""
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        return "there is no unshare(1) or mount(8)"
    tried = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"], capture_output=True, text=True
    )
    return tried.stderr.strip() if tried.returncode else ""


@pytest.mark.parametrize(
    "cases",
    [
        "a_disk_that_is_full_for_a_while,a_disk_that_stays_full",
        "checkpoints_on_a_disk_that_turns_read_only,a_read_only_folder",
    ],
)
def test_on_a_disk_of_its_own(tmp_path, cases):
    if reason := without_mounts():
        pytest.skip(f"this machine mounts nothing for a test: {reason}")
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-m", "tests.training.mounted", cases, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CLINOMETER_LANG": "en"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == cases.split(",")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_rows_that_a_full_disk_does_not_take_are_written_when_it_does(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append(step=1)
    kept = os.dup(lines._file.fileno())
    with open("/dev/full", "ab") as full:
        os.dup2(full.fileno(), lines._file.fileno())
    for step in (2, 3):
        lines.append(step=step)
        assert lines.trouble is not None
        assert "No space left" in str(lines.trouble)
    with pytest.raises(OSError, match="No space left"):
        lines.sync()  # so there is no checkpoint that counts on them
    os.dup2(kept, lines._file.fileno())
    os.close(kept)
    lines.append(step=4)
    assert lines.trouble is None
    lines.close()
    (tmp_path / "config.toml").touch()
    assert [row["step"] for row in RunFolder(tmp_path).metrics()] == [1, 2, 3, 4]


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE")
def test_a_command_that_meets_a_limit_of_the_system_says_so_in_one_paragraph(corpus, tmp_path):
    """The system lets no file grow beyond 20 kB: a tokenizer, a checkpoint, the tokens do not fit."""
    limited = (
        "import os, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'clinometer', *sys.argv[1:]])\n"
    )
    command = [sys.executable, "-c", limited, "train", "--corpus", corpus, "--run", "run", *SMALL]
    result = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )
    assert_refused((result.returncode, result.stdout, result.stderr), "File too large")
    assert not (tmp_path / "run" / "checkpoints").exists() or not list(
        (tmp_path / "run" / "checkpoints").iterdir()
    )
