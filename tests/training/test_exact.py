"""Resumed is uninterrupted, bit for bit: weights, moments, losses, samples and the run file, of any run."""

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from clinometer.training.run import prepare
from clinometer.training.run.loop import Outcome, train
from clinometer.training.run.recording import open_record
from clinometer.training.settings.config import OptimConfig, ScheduleConfig
from tests.training.conftest import SENTENCES, Silent, small_config, stopped_after
from tests.training.test_loop import assert_same_run
from tests.training.test_recording import contents

OPTIMIZERS = [
    OptimConfig(lr=1e-2),
    OptimConfig(lr=1e-2, max_norm=0.05, weight_decay=0.3),
    OptimConfig(name="sgd", lr=0.1, momentum=0.9),
    OptimConfig(name="sgd", lr=0.1, momentum=0.0),
    OptimConfig(name="muon", lr=1e-2, embedding_lr=3e-2),
]
SETTINGS = {
    "micro_batch_size": [None, 2, 1],
    "precision": ["float32", "bfloat16"],
    "checkpoint_every": [1, 3, 7, 100],
    "eval_every": [1, 4, 100],
    "sample_every": [3, 10],
    "watch_every": [1, 3, 0],
    "async_checkpoints": [False, True],
    "activation_checkpointing": [False, True],
    "keep": [1, 5],
}


class Killed(BaseException):
    pass


def killed_after(step):
    """A display that ends the run as a kill does: no step is finished, no checkpoint written."""
    display = Silent()

    def die(row):
        if row["step"] == step:
            raise Killed

    display.step = die
    return display


def drop_words(session):
    """A tenth of the tokens is replaced by token 0, drawn from torch's generator as dropout draws."""
    original = session.model.loss

    def loss(token_ids, targets, **options):
        if torch.is_grad_enabled():
            token_ids = token_ids.masked_fill(torch.rand(token_ids.shape) < 0.1, 0)
        return original(token_ids, targets, **options)

    session.model.loss = loss


def go(config, path, dropout, display=None):
    display = display or Silent()
    again = (path / "config.toml").exists()
    session = prepare.resume(path, None, display) if again else prepare.start(config, path, display)
    if dropout:
        drop_words(session)
    record, outcome = open_record(session, display), None
    try:
        outcome = train(session, display, record, display.request)
    except Killed:
        pass
    finally:
        record.close(outcome)
        session.close()
    return outcome


def trial(corpus, folder, optim, schedule, training, dropout, breaks):
    """`breaks`: (step, how) in order. The corpus is passed through twice in the twenty steps."""
    corpus.write_text("\n".join(corpus.read_text(encoding="utf-8").splitlines()[:26]), encoding="utf-8")
    config = replace(small_config(corpus, **training), optim=optim, schedule=ScheduleConfig(name=schedule))
    assert go(config, folder / "whole", dropout) is Outcome.DONE
    for step, how in breaks:
        display = killed_after(step) if how == "kill" else stopped_after(step, how)
        outcome = go(config, folder / "broken", dropout, display)
        assert outcome in (None, Outcome.INTERRUPTED, Outcome.TERMINATED, Outcome.DONE), outcome
    assert go(config, folder / "broken", dropout) is Outcome.DONE
    assert_same_run(folder / "whole", folder / "broken")
    if config.training.watch_every:
        for one, two in zip(recorded(folder / "whole"), recorded(folder / "broken"), strict=True):
            assert_equal(one, two)


def recorded(path):
    """The run file's contents, but for checkpoints: a run that is asked to stop writes one more."""
    *rows, events = contents(path)
    return [*rows, [event for event in events if event[1] != "checkpoint"]]


def assert_equal(one, two):
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_equal(a, b)
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, two, equal_nan=one.dtype.kind == "f")
    else:
        assert one == two or (one != one and two != two)


HOWS = [signal.SIGINT, signal.SIGTERM, "kill"]


# Not shrunk: each try is two runs.
@settings(
    max_examples=5,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    optim=st.sampled_from(OPTIMIZERS),
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    training=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in SETTINGS.items()}),
    dropout=st.booleans(),
    breaks=st.lists(st.tuples(st.integers(1, 19), st.sampled_from(HOWS)), min_size=1, max_size=3),
)
def test_whatever_the_run_an_interruption_changes_no_bit(
    corpus, tmp_path_factory, optim, schedule, training, dropout, breaks
):
    breaks.sort(key=lambda one: one[0])
    trial(corpus, tmp_path_factory.mktemp("runs"), optim, schedule, training, dropout, breaks)


@pytest.mark.soak
@pytest.mark.parametrize(("compile", "count"), [("off", 100), ("on", 20)])
def test_of_many_random_runs_none_is_changed_by_interruptions(tmp_path, compile, count):
    """In a process of its own: the compiler does not take functions whose shapes the tests check."""
    command = [sys.executable, "-m", "tests.training.test_exact", str(tmp_path), compile, str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CLINOMETER_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == f"{count} runs, {count} the same"


def many(folder, compile, count):
    chance = random.Random(0)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(SENTENCES[i % 4] + f" {i * i}" for i in range(400)), encoding="utf-8")
    for number in range(count):
        training = {name: chance.choice(values) for name, values in SETTINGS.items()} | {"compile": compile}
        steps = sorted(chance.sample(range(1, 20), chance.randint(1, 4)))
        optim, schedule = chance.choice(OPTIMIZERS), chance.choice(["cosine", "wsd", "constant"])
        dropout, breaks = chance.random() < 0.5, [(step, chance.choice(HOWS)) for step in steps]
        print(number, optim.name, schedule, training, dropout, breaks, flush=True)
        trial(corpus, folder / str(number), optim, schedule, training, dropout, breaks)
    print(f"{count} runs, {count} the same")


if __name__ == "__main__":
    torch.set_num_threads(1)
    many(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
