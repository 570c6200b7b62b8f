"""However one rank ends, all end: one message that names it, an exit code, and a good checkpoint."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from clinometer.distributed.board import Board
from clinometer.distributed.launch import Launch, launched
from clinometer.messages import InputError
from clinometer.training.checkpoints.checkpoint import checkpoints, load_checkpoint
from clinometer.training.run.run_folder import RunFolder
from tests.training.conftest import SENTENCES, assert_refused, small
from tests.training.ranks import ranks_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


def arguments(folder, *more):
    text = "\n".join(SENTENCES[i % 4] + f" {i * i}" for i in range(400))
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    settings = small("--training.steps=100000", "--training.sample-tokens=0", "--training.device=cpu", *more)
    settings += ["--training.checkpoint-every=5", "--training.eval-every=100000", "--training.keep=5"]
    return ["clinometer", "train", "--run", "run", "--corpus", "corpus.txt", *settings]


def rows(folder):
    try:
        return [row["step"] for row in RunFolder(folder / "run").metrics() if "lr" in row]
    except OSError:
        return []


def in_training(folder, processes, steps=12):
    until = time.monotonic() + 300
    while len(rows(folder)) < steps:
        assert time.monotonic() < until
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
        time.sleep(0.05)


def ended_ranks(processes):
    out = [p.communicate() for p in processes]
    return [(p.returncode, *texts) for p, texts in zip(processes, out, strict=True)]


def assert_good_checkpoint(folder):
    """The newest loads, every file of it by hash, and nothing half is beside it."""
    saved = checkpoints(folder / "run" / "checkpoints")
    assert load_checkpoint(saved[-1], None)["step"] >= 5
    return saved


def test_a_bad_setting_is_said_once_and_every_rank_ends_with_2(tmp_path):
    wrong = [*arguments(tmp_path), "--training.parallel=dpp"]
    told = ended_ranks(ranks_of(2, wrong, tmp_path, cwd=tmp_path))
    assert [code for code, _, _ in told] == [2, 2]
    texts = [out + err for _, out, err in told]
    assert sum(text.count("dpp") for text in texts) == 1
    assert "Traceback" not in "".join(texts)


def test_a_fault_of_the_first_rank_alone_ends_all_with_its_message(tmp_path):
    """A batch too small for the ranks is found by rank 0, while the other waits for its word."""
    told = ended_ranks(ranks_of(2, arguments(tmp_path, "--training.batch-size=1"), tmp_path, cwd=tmp_path))
    assert [code for code, _, _ in told] == [2, 2]
    assert "".join(out + err for _, out, err in told).count("2 ranks") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_hangs_is_named_and_the_other_ends(tmp_path, number):
    ranks = ranks_of(2, [*arguments(tmp_path), "--training.rank-patience=3"], tmp_path, cwd=tmp_path)
    try:
        in_training(tmp_path, ranks)
        ranks[1].send_signal(number)
        out, err = ranks[0].communicate()
        assert ranks[0].returncode == 3
        assert "Rank 1 on host" in err
        assert err.count("The run ends here") == 1
        assert "Traceback" not in out + err
        saved = assert_good_checkpoint(tmp_path)
        assert str(saved[-1].name) in err
    finally:
        ranks[1].kill()
        ranks[1].communicate()


def test_torchrun_that_is_told_to_stop_leaves_a_checkpoint_that_goes_on(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    given = ["--folder" if word == "--run" else word for word in arguments(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CLINOMETER_CACHE": str(tmp_path / "cache")}
    environment |= {"COLUMNS": "300", "CLINOMETER_LANG": "en"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, *given], cwd=tmp_path, env=environment, **pipes)
    in_training(tmp_path, [process])
    process.terminate()
    out, err = process.communicate()
    saved = assert_good_checkpoint(tmp_path)
    last = rows(tmp_path)
    assert last == list(range(1, len(last) + 1))
    assert int(saved[-1].name.removeprefix("step-")) == last[-1]  # that of the step at which all stopped
    assert out.count("Stopped at step") == 1, (out, err)
    state = json.loads((saved[-1] / "state.json").read_text())
    assert len(state["files"]) == 4


def test_a_launchers_contradiction_is_refused(clinometer):
    result = clinometer("doctor", env={"RANK": "2", "WORLD_SIZE": "2"})
    assert_refused((result.returncode, result.stdout, result.stderr), "RANK", "2, 2")
    assert launched({}) is None
    assert launched({"WORLD_SIZE": "1", "RANK": "0"}) is None


def test_a_first_machine_that_does_not_answer_is_named_in_a_sentence_when_its_time_is_over(capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens: a connection is refused
        launch = Launch(rank=1, size=2, local_rank=1, address="127.0.0.1", port=taken.getsockname()[1])
        start = time.monotonic()
        with pytest.raises(InputError, match=f"127.0.0.1:{launch.port}: .*refused"):
            Board.open(launch, seconds=0.5)
        assert time.monotonic() - start >= 0.5  # it may yet be started
    assert capfd.readouterr().err == ""


SHORT = """
import os, pathlib, sys, time
from rich.console import Console
from clinometer.commands import train
from clinometer.training.settings import config
from clinometer.training.ranks import world
world.OPENING_SECONDS = float(sys.argv[1])
given = config.config_from({"data": {"corpus": "corpus.txt"}})
# Whoever comes is ready before anybody's time begins: on a busy machine Python needs a while.
pathlib.Path(f"ready-{os.environ['RANK']}").touch()
while len(list(pathlib.Path().glob("ready-*"))) < int(sys.argv[2]):
    time.sleep(0.01)
sys.exit(train.train_command(Console(), given, pathlib.Path("run"), False))
"""


@pytest.mark.parametrize(("come", "seconds"), [([0], 1), ([0, 1], 10)])
def test_a_rank_that_never_comes_is_named_by_the_first(tmp_path, come, seconds):
    (tmp_path / "corpus.txt").write_text("few words\n" * 99)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SHORT, str(seconds), str(len(come))],
            cwd=tmp_path,
            env={**os.environ, **place, "WORLD_SIZE": "3", "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in come
    ]
    told = [rank.communicate()[1] for rank in ranks]
    missing = "Ranks 1, 2" if come == [0] else "Rank 2"
    assert_refused((ranks[0].returncode, "", told[0]), f"{missing} did not join within {seconds} s")
    assert told[1:] in ([], [""])  # one says it
    assert {rank.returncode for rank in ranks} == {2}
    assert not (tmp_path / "run").exists()
