"""Trainings that are killed, forked from a process that has imported everything.

`python -m tests.training.killing points|random FOLDER COUNT SEED` prints how many were killed.
"points" kills at every COUNT-th call that changes a file, "random" at COUNT random moments.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from clinometer.record.read.reader import RunFile
from clinometer.text.token_shards import TokenData
from clinometer.training.checkpoints import checkpoint, retention
from clinometer.training.run import prepare
from clinometer.training.run.loop import Outcome, train
from clinometer.training.run.recording import open_record
from clinometer.training.run.run_folder import RunFolder
from tests.training.conftest import SENTENCES, Silent, small_config
from tests.training.ranks import OPTIMIZERS
from tests.training.test_checkpoint import trained

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree"}
CHANGES |= {"sqlite3.connect"}


def forked(call) -> int:
    """The exit code of a child that calls it: −9 if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            call()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(number: int) -> None:
    """This process dies before its `number`-th call that changes a file."""
    seen = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal seen
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in CHANGES:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def every_point(folder: Path, before, during, check, stride: int) -> int:
    """Kills `during(here)` at each point in turn, and has `check(here)` look at what is left."""
    number, kills = stride, 0
    while True:
        here = folder / str(number)
        here.mkdir(parents=True)
        assert forked(lambda here=here: before(here)) == 0

        def act(here=here, number=number):
            kill_at(number)
            during(here)

        code = forked(act)
        assert code in (0, -9), (here, code)
        assert forked(lambda here=here: check(here)) == 0, here
        shutil.rmtree(here)
        if code == 0:
            return kills
        kills, number = kills + 1, number + stride


# A checkpoint, and the removal of older ones.


def two_saved(here: Path) -> None:
    for step in (1, 2):
        checkpoint.save_checkpoint(here, step, *trained(steps=step), {})


def save_and_prune(here: Path) -> None:
    checkpoint.save_checkpoint(here, 3, *trained(), {})
    (here / "committed").touch()
    checkpoint.save_checkpoint(here, 3, *trained(), {})  # the same once more
    retention.prune(here, 2, None)


def only_whole_ones_count(here: Path) -> None:
    found = whole_checkpoints(here)
    assert found[-1] >= (3 if (here / "committed").exists() else 2), found
    retention.sweep(here)
    checkpoint.save_checkpoint(here, 4, *trained(), {})
    retention.prune(here, 2, None)
    (here / "committed").unlink(missing_ok=True)
    left = sorted(path.name for path in here.iterdir())
    assert left == sorted({f"step-{found[-1]:08d}", "step-00000004"}), left


def whole_checkpoints(folder: Path) -> list[int]:
    """The steps of those that count; each must be whole, by hash."""
    for path in (saved := checkpoint.checkpoints(folder)):
        state = checkpoint.read_state(path)
        for name, written in state["files"].items():
            checkpoint.verify(path / name, written)
        assert {p.name for p in path.iterdir()} == {*state["files"], "state.json"}
    return [checkpoint.step_of(path) for path in saved]


# A run, from its first folder to its last step, its text's shards included.


def configured(here: Path, number: int = 0, steps: int = 3):
    corpus = here.parent / "corpus.txt"
    if not corpus.exists():
        corpus.write_text("\n".join(SENTENCES[i % 4] + f" {i * i}" for i in range(400)), encoding="utf-8")
    often = {"checkpoint_every": 1, "eval_every": 2, "sample_every": 2, "sample_tokens": 4, "keep": 2}
    config = small_config(corpus, steps=steps, **often, async_checkpoints=number % 2 == 1)
    config = replace(config, optim=list(OPTIMIZERS.values())[number % 3])
    return replace(config, data=replace(config.data, tokenizer=("bytes", "bpe")[number // 2 % 2]))


def run_to_its_end(here: Path, config) -> None:
    """Starts, or resumes what was started, as the command line does."""
    os.environ["CLINOMETER_CACHE"] = str(here / "cache")
    path = here / "run"
    if (path / "config.toml").exists():
        session = prepare.resume(path, None, Silent())
    else:
        session = prepare.start(config, path, Silent())
    record = open_record(session, Silent())
    outcome = Outcome.DONE if session.step >= config.training.steps else train(session, Silent(), record)
    record.close(outcome)
    session.close()
    assert outcome is Outcome.DONE


def assert_committed(here: Path) -> int:
    """After a kill: what counts as a checkpoint or as shards is whole, and its rows are there."""
    path, newest = here / "run", 0
    if (path / "checkpoints").is_dir():
        newest = max(whole_checkpoints(path / "checkpoints"), default=0)
    if newest:
        rows = [row["step"] for row in RunFolder(path).metrics() if "lr" in row]
        assert rows[:newest] == list(range(1, newest + 1)), (newest, rows)
        file = RunFile.open(path)
        assert file.info()["last_step"] >= newest
        file.close()
    for header in here.glob("cache/tokens/[!.]*/header.json"):
        TokenData.open(header.parent).verify()
    return newest


def assert_same_end(here: Path, whole: Path) -> None:
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [checkpoint.checkpoints(p / "run" / "checkpoints")[-1] / name for p in (here, whole)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    rows = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in RunFolder(p / "run").metrics()]
        for p in (here, whole)
    ]
    assert rows[0] == rows[1]
    names = [{p.name for p in (f / "run" / "checkpoints").iterdir()} for f in (here, whole)]
    # Killed after its last save and before the removal of an older one, a run keeps that: a whole one.
    assert names[0] >= names[1], names
    assert len(whole_checkpoints(here / "run" / "checkpoints")) == len(names[0])
    assert not list(here.glob("cache/tokens/.*building*"))


def kill_runs(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Kills at random moments of runs of all kinds; each run must end as one that was left alone."""
    chance, kills, runs, during, kinds = random.Random(seed), 0, 0, {"shards": 0, "checkpoint": 0}, {}
    while kills < count:
        kind, here = runs % 12, folder / f"run-{runs}"
        here.mkdir(parents=True)
        config = configured(here, kind, steps=12)
        if kind not in kinds:
            whole, began = folder / f"whole-{kind}", time.monotonic()
            whole.mkdir()
            assert forked(lambda config=config, whole=whole: run_to_its_end(whole, config)) == 0
            kinds[kind] = whole, time.monotonic() - began
        whole, seconds = kinds[kind]
        newest, code = 0, -9
        while code == -9:
            child = os.fork()
            if child == 0:
                os._exit(in_child(here, config))
            # The first moments are as likely as the rest, and a run is not killed for ever.
            time.sleep(chance.choice([0.1, 0.4, 0.9]) * chance.random() * seconds)
            if kills < count:
                os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code == -9:
                kills += 1
                during["checkpoint"] += bool(list(here.glob("run/checkpoints/.step-*.tmp")))
                during["shards"] += bool(list(here.glob("cache/tokens/.*building*")))
            assert code in (0, -9), (here, code)
            now = assert_committed(here)
            assert now >= newest, (here, newest, now)
            newest = now
        assert_same_end(here, whole)
        shutil.rmtree(here)
        runs += 1
    return {"kills": kills, "runs": runs, **during}


def in_child(here: Path, config) -> int:
    try:
        run_to_its_end(here, config)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def kill_points(folder: Path, stride: int) -> dict[str, int]:
    kills = {
        "checkpoint": every_point(folder / "saves", two_saved, save_and_prune, only_whole_ones_count, stride)
    }
    for number in (0, 1):
        folder_of_kind = folder / f"runs-{number}"
        whole = folder_of_kind / "whole"
        whole.mkdir(parents=True)
        assert forked(lambda w=whole, n=number: run_to_its_end(w, configured(w, n))) == 0

        def during(here, number=number):
            run_to_its_end(here, configured(here, number))

        def check(here, number=number, whole=whole):
            assert_committed(here)
            run_to_its_end(here, configured(here, number))
            assert_same_end(here, whole)

        kills[f"run {number}"] = every_point(folder_of_kind, lambda here: None, during, check, stride)
    return kills


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where, amount, chosen = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    found = kill_points(where, amount) if what == "points" else kill_runs(where, amount, chosen)
    print("; ".join(f"{name}: {number}" for name, number in found.items()))
