"""Long trials, as processes: `make soak`."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from clinometer.distributed.launch import OPENING_SECONDS
from clinometer.training.checkpoints import checkpoint
from clinometer.training.run.run_folder import RunFolder
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


@pytest.mark.soak
def test_four_ranks_train_what_one_process_trains(tmp_path):
    from tests.training.test_parallel import assert_close, one, run_job

    for folder, told in run_job(tmp_path, 4):
        for name in ("fsdp-adamw", "ddp-adamw", "fsdp-sgd", "fsdp-muon"):
            assert all(rank["losses"][name] == told[0]["losses"][name] for rank in told)
            wanted = one(folder, name.partition("-")[2])
            assert_close(told[0]["losses"][name], wanted, 5e-3 if "muon" in name else 2e-4)
        assert_close(told[0]["losses"]["odd"], one(folder, "adamw", batch_size=5))
        for name in ("adamw", "sgd", "muon"):
            assert {rank[f"stopped-{name}"] for rank in told} == {9}
            assert told[0]["losses"][f"resumed-{name}"][:11] == told[0]["losses"][f"fsdp-{name}"][9:20]


@pytest.mark.soak
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ranks_killed_at_random_moments_lose_nothing_that_was_committed(corpus, tmp_path):
    from tests.training.ranks import ranks_of

    chance = random.Random(1)
    settings = small("--training.steps=300", "--training.device=cpu", "--training.checkpoint-every=3")
    command = ["clinometer", "train", "--run", "run", *settings, "--training.rank-patience=5"]
    whole = ["--corpus", str(corpus)]
    finish_ranks(ranks_of(2, [*command[:3], "whole", *settings, *whole], tmp_path, cwd=tmp_path))
    kills = unmet = 0
    while True:
        started = (tmp_path / "run" / "config.toml").exists()
        ranks = ranks_of(2, [*command, *whole, *(["--resume"] if started else [])], tmp_path, cwd=tmp_path)
        victim = chance.randrange(2)
        time.sleep(chance.uniform(4, 12))
        if kills < 10 and ranks[victim].poll() is None:
            ranks[victim].kill()
            kills += 1
        out = [rank.communicate(timeout=OPENING_SECONDS + 120) for rank in ranks]
        codes = [rank.returncode for rank in ranks]
        if codes == [0, 0]:
            break
        assert codes[victim] == -9, out
        # 2: killed before they had met; the other has waited as long as a large job may take to begin.
        assert codes[1 - victim] in (2, 3), out
        unmet += codes[1 - victim] == 2
    print(f"{kills} kills, {unmet} of them before the ranks had met")
    assert kills - unmet >= 2
    last = [checkpoint.checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "run")]
    for file in sorted(p.name for p in last[0].glob("*.safetensors")):
        assert (last[0] / file).read_bytes() == (last[1] / file).read_bytes(), file


def finish_ranks(ranks):
    out = [rank.communicate(timeout=600) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), out
