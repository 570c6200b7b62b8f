"""Trainings that get signals at many moments, forked from a process that has imported everything.

`python -m tests.training.signalling FOLDER MOMENTS` prints how many moments of each kind were tried. A moment
is a call of a Python or C function between the start of step 2 and the end of the command; half of them lie
in the last write of a checkpoint.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from clinometer.commands.train import train_command
from clinometer.record.read.reader import RunFile
from clinometer.training.checkpoints import checkpoint
from clinometer.training.run import loop
from tests.training.conftest import SENTENCES, small_config
from tests.training.killing import forked, whole_checkpoints

STEP, STEPS = 2, 4
KINDS = {
    "one SIGTERM": (None, signal.SIGTERM),
    "a second SIGTERM": (signal.SIGTERM, signal.SIGTERM),
    "a second Ctrl-C": (signal.SIGINT, signal.SIGINT),
    "Ctrl-C after SIGTERM": (signal.SIGTERM, signal.SIGINT),
}
"""The signal at the start of step 2, and the one at the moment."""


def send_signals(here: Path, first: signal.Signals | None, later: signal.Signals, moment: int) -> None:
    """Has this process send itself `first` as step 2 begins, and `later` that many calls after it."""
    batch_of, calls = loop.batch_of, 0
    (here / "writing").touch()
    write, writes = checkpoint.write_checkpoint, [0, 0]

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == moment:
            sys.setprofile(None)
            # Which checkpoints are half written at this moment.
            (here / "writing").write_text(" ".join(p.name for p in here.glob("run/checkpoints/.step-*.tmp")))
            os.kill(os.getpid(), later)

    def batch_and_signal(computation, step):
        if step == STEP - 1:
            loop.batch_of = batch_of
            if first is not None:
                os.kill(os.getpid(), first)
            sys.setprofile(count)
        return batch_of(computation, step)

    def write_and_count(*given):
        writes[0] = calls
        try:
            return write(*given)
        finally:
            writes[1] = calls

    loop.batch_of, checkpoint.write_checkpoint = batch_and_signal, write_and_count
    try:
        sys.exit(run(here))
    finally:
        sys.setprofile(None)
        (here / "calls").write_text(json.dumps([calls, *writes]))


def run(here: Path) -> int:
    often = {"checkpoint_every": 1, "eval_every": 2, "sample_every": 2, "sample_tokens": 4, "keep": 9}
    beside = here.name.endswith("beside")
    config = small_config(here.parent / "corpus.txt", steps=STEPS, **often, async_checkpoints=beside)
    if beside:  # slow, so that it is being written when the next step is taken
        write = checkpoint.write_files
        checkpoint.write_files = lambda *given: (time.sleep(0.02), write(*given))[1]
    return train_command(Console(file=io.StringIO()), config, here / "run", False)


def exit_code(call) -> int:
    """Of a child that calls it, as `main` has it: 130 for KeyboardInterrupt; −signal if one killed it."""

    def with_code() -> None:
        try:
            call()
        except KeyboardInterrupt:
            code = 130
        except SystemExit as ended:
            code = int(ended.code or 0)
        os._exit(code)

    return forked(with_code)


def tensors(here: Path, step: int) -> list[bytes]:
    folder = here / "run" / "checkpoints" / f"step-{step:08d}"
    return [(folder / f"{kind}.safetensors").read_bytes() for kind in ("model", "optimizer")]


def assert_stopped_well(here: Path, whole: Path, kind: str, code: int) -> None:
    """Every checkpoint is whole and that of an undisturbed run; the one of the last step is missing only
    where a second Ctrl-C came before it was begun."""
    first, later = KINDS[kind]
    file = RunFile.open(here / "run")
    steps, last, state = (
        whole_checkpoints(here / "run" / "checkpoints"),
        file.info()["last_step"],
        file.info()["state"],
    )
    file.close()
    assert not list((here / "run" / "checkpoints").glob(".*")), "a half-written checkpoint is left"
    assert all(tensors(here, step) == tensors(whole, step) for step in steps)
    if code == -signal.SIGTERM:  # the last file was closed before it came, and the handlers were gone
        assert steps[-1] == last
        return
    if code == 0:  # it came when the last step was done
        assert (first, last, state) == (None, STEPS, "done")
        assert steps[-1] == STEPS
        return
    assert state == "stopped"
    if later is signal.SIGTERM:
        assert (code, steps[-1]) == (143, last)
    elif code == 143:  # it came after the decision to end: nothing was left to be hurried
        assert (first, steps[-1]) == (signal.SIGTERM, STEP)
    else:
        assert code == 130
        begun = (here / "writing").read_text().replace(".step-", "step-").split()
        assert all(checkpoint.step_of(Path(name.split(".")[0])) in steps for name in begun), (begun, steps)
        assert steps[-1] >= STEP - 1


def try_moments(folder: Path, amount: int) -> dict[str, int]:
    (folder / "corpus.txt").write_text("\n".join(SENTENCES[i % 4] + f" {i * i}" for i in range(400)))
    os.environ["CLINOMETER_CACHE"] = str(folder / "cache")
    tried = {}
    for beside in (False, True):
        ending = "-beside" if beside else ""
        whole = folder / f"whole{ending}"
        assert exit_code(lambda whole=whole: sys.exit(run(whole))) == 0
        for kind, (first, later) in KINDS.items():
            here = folder / f"{kind} never{ending}"
            here.mkdir()
            exit_code(lambda h=here, f=first, s=later: send_signals(h, f, s, -1))
            calls, begun, done = json.loads((here / "calls").read_text())
            half = amount // 2
            moments = [begun + number * (done - begun) // half for number in range(1, half + 1)]
            moments += [1 + number * (calls - 1) // (half - 1) for number in range(half)]
            for number, moment in enumerate(moments):
                here = folder / f"{kind} {number}{ending}"
                here.mkdir()
                code = exit_code(lambda h=here, f=first, s=later, m=moment: send_signals(h, f, s, m))
                try:
                    assert_stopped_well(here, whole, kind, code)
                except Exception as error:
                    raise AssertionError(f"{here.name}, call {moment} of {calls}: code {code}") from error
                tried[kind] = tried.get(kind, 0) + 1
                tried["while writing"] = tried.get("while writing", 0) + bool((here / "writing").read_text())
    return tried


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = try_moments(Path(sys.argv[1]), int(sys.argv[2]))
    print("; ".join(f"{kind}: {number}" for kind, number in found.items()))
