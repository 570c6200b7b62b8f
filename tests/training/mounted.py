"""Runs on disks of their own: `unshare -rm python -m tests.training.mounted CASES FOLDER`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clinometer.messages import InputError
from clinometer.record.read.reader import RunFile
from clinometer.training.checkpoints import checkpoint
from clinometer.training.run import prepare
from clinometer.training.run.loop import Outcome, train
from clinometer.training.run.recording import open_record
from clinometer.training.run.run_folder import RunFolder
from tests.training.conftest import SENTENCES, Silent, small_config
from tests.training.test_loop import assert_same_run, run_whole

STEPS = 20


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def disk(folder: Path, size: str = "6m") -> Path:
    """A small disk."""
    path = folder / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", path)
    return path


def fill(path: Path) -> Path:
    """Until not a byte more fits."""
    with (file := path / "filler").open("wb", buffering=0) as stream:
        for size in (1 << 16, 1 << 8, 1):
            try:
                while True:
                    stream.write(bytes(size))
            except OSError:
                continue
    return file


def configured(folder: Path):
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(SENTENCES[i % 4] + f" {i * i}" for i in range(400)), encoding="utf-8")
    return small_config(corpus, checkpoint_every=2, keep=4)


def trained_while(config, path: Path, at: dict) -> tuple[Silent, object]:
    """A recorded run in which `at[step]` is called after that step; what was shown, and how it ended."""
    session, display = prepare.start(config, path, Silent()), Silent()

    def look(row):
        display.rows.append(row)
        at.get(row["step"], lambda: None)()

    display.step = look
    record = open_record(session, display)
    try:
        outcome = train(session, display, record)
        record.close(outcome)
    except InputError as error:
        outcome = error
        record.close(None)
    session.close()
    return display, outcome


def a_disk_that_is_full_for_a_while(folder: Path) -> None:
    config, place = configured(folder), disk(folder)
    whole = run_whole(config, folder / "whole")
    filler: list[Path] = []
    at = {5: lambda: filler.append(fill(place)), 13: lambda: filler.pop().unlink()}
    display, outcome = trained_while(config, place / "run", at)
    assert outcome is Outcome.DONE, outcome
    told = [key for key, _ in display.notices]
    assert told.count("train.rows_wait") <= 1, told  # rows may still fit into the file's last page
    reasons = [v["reason"] for k, v in display.notices if k == "train.checkpoint_failed"]
    assert 3 <= len(reasons) <= 5, told
    assert all("No space left" in reason for reason in reasons), reasons
    assert told.count("train.sample_unkept") == 1, told
    (place / "run" / "samples" / "step-00000010.txt").write_text(display.samples[0][1])
    assert_same_run(whole, place / "run")
    run = RunFile.open(place / "run")
    assert (run.info()["last_step"] or 0) >= 4  # it is tried again after 16 steps, and the gap is marked
    run.close()


def a_disk_that_stays_full(folder: Path) -> None:
    config, place = configured(folder), disk(folder)
    whole = run_whole(config, folder / "whole")
    _, error = trained_while(config, place / "run", {9: lambda: fill(place)})
    assert isinstance(error, InputError), error
    assert error.key == "checkpoint.not_written"
    saved = checkpoint.checkpoints(place / "run" / "checkpoints")
    assert checkpoint.step_of(saved[-1]) == 8
    checkpoint.load_checkpoint(saved[-1], None)
    assert not list((place / "run" / "checkpoints").glob(".*"))
    # To go on without space is refused in words, and with space it ends as if nothing had been.
    (place / "filler").unlink()
    session = prepare.resume(place / "run", None, Silent())
    assert train(session, Silent()) is Outcome.DONE
    session.close()
    assert_same_run(whole, place / "run")


def checkpoints_on_a_disk_that_turns_read_only(folder: Path) -> None:
    config, place = configured(folder), folder / "run" / "checkpoints"
    whole = run_whole(config, folder / "whole")
    display, outcome = trained_while(
        config,
        folder / "run",
        {
            5: lambda: mount("-t", "tmpfs", "-o", "ro", "tmpfs", place),
            11: lambda: subprocess.run(["umount", str(place)], check=True),
        },
    )
    assert outcome is Outcome.DONE, outcome
    reasons = [v["reason"] for k, v in display.notices if k == "train.checkpoint_failed"]
    assert reasons
    assert all("Read-only file system" in reason for reason in reasons), reasons
    assert_same_run(whole, folder / "run")


def a_read_only_folder(folder: Path) -> None:
    config = configured(folder)
    place = folder / "kept"
    place.mkdir()
    run_whole(config, place / "run")
    mount("--bind", place, place)
    mount("-o", "remount,bind,ro", place)
    before = sorted(p.name for p in (place / "run").rglob("*"))
    for call, key in (
        (lambda: prepare.start(config, place / "other", Silent()), "run.not_writable"),
        (lambda: prepare.resume(place / "run", None, Silent()), "run.not_writable"),
    ):
        with pytest.raises(InputError, match="Read-only file system") as error:
            call()
        assert error.value.key == key
    # What only reads works.
    from clinometer.training.run.load_run import load_run

    assert load_run(place / "run").step > 0
    assert sorted(p.name for p in (place / "run").rglob("*")) == before
    assert len(list(RunFolder(place / "run").metrics())) > STEPS


CASES = {
    case.__name__: case
    for case in (
        a_disk_that_is_full_for_a_while,
        a_disk_that_stays_full,
        checkpoints_on_a_disk_that_turns_read_only,
        a_read_only_folder,
    )
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["CLINOMETER_CACHE"] = f"{sys.argv[2]}/cache"
    for name in sys.argv[1].split(","):
        here = Path(sys.argv[2]) / name
        here.mkdir()
        CASES[name](here)
        print(name)
