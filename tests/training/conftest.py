"""A small corpus, a run that takes a second, and the command line as a user calls it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clinometer import cli
from clinometer.commands.helpers.process_settings import PROCESS_SETTINGS
from clinometer.messages import set_language
from clinometer.training.run.stop_signals import StopRequest
from clinometer.training.settings.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainingConfig,
)

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "a gradient points up and the step goes down",
    "words follow words and the model learns which",
    "梯度指向上升的方向，而更新沿着它的反方向走",
]


class Silent:
    """A display that keeps what it was told; `stopped_after` puts a request into it."""

    request: StopRequest | None = None

    def __init__(self):
        self.rows, self.notices, self.validations, self.samples = [], [], [], []

    def notice(self, key, /, **values):
        self.notices.append((key, values))

    def progress(self, key, done, total):
        pass

    def step(self, row):
        self.rows.append(row)

    def validation(self, step, loss, best):
        self.validations.append((step, loss, best))

    def sample(self, step, text):
        self.samples.append((step, text))


def stopped_after(step, number=signal.SIGINT):
    """A display with a request that is asked to stop once `step` steps are done.

    No signal is sent: it would reach whatever this process does next. test_signalling.py sends real ones.
    """
    display = Silent()
    display.request = request = StopRequest()

    def ask(row, keep=display.step):
        keep(row)
        if row["step"] == step:
            request.ask(number)

    display.step = ask
    return display


@pytest.fixture
def display():
    return Silent()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLINOMETER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(SENTENCES[i % 4] + f" {i * i}" for i in range(400)), encoding="utf-8")
    return path


@pytest.fixture
def config(corpus) -> RunConfig:
    return small_config(corpus)


def small_config(corpus: Path, **training) -> RunConfig:
    """Twenty steps of a model of about 20,000 weights."""
    fields = {
        "steps": 20,
        "batch_size": 4,
        "eval_every": 5,
        "eval_batches": 2,
        "sample_every": 10,
        "sample_tokens": 8,
        "checkpoint_every": 7,
        "precision": "float32",
        "compile": "off",
        "device": "cpu",
    }
    return RunConfig(
        model=ModelConfig(context_length=16, d_model=16, num_layers=2, num_heads=2),
        data=DataConfig(corpus=str(corpus), tokenizer="bytes"),
        optim=OptimConfig(lr=1e-2),
        training=TrainingConfig(**fields | training),
    )


def small(*changes: str) -> list[str]:
    """SMALL, with these settings in place of its own."""
    names = {change.split("=")[0] for change in changes}
    return [s for s in SMALL if s.split("=")[0] not in names] + list(changes)


SMALL = [
    "--model.context-length=16",
    "--model.d-model=16",
    "--model.num-layers=1",
    "--model.num-heads=2",
    "--data.tokenizer=bytes",
    "--training.batch-size=4",
    "--training.precision=float32",
    "--training.compile=off",
    "--training.sample-tokens=8",
    "--training.eval-batches=2",
]


@pytest.fixture
def clinometer(tmp_path):
    """Run the command line in an empty folder, as a user would; returns the finished process."""

    def call(*arguments, timeout=None, **options) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **options.pop("env", {}), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, "-m", "clinometer", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=options.pop("cwd", tmp_path),
            env=environment,
            **options,
        )

    return call


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run a command in this process, in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    for name, value in PROCESS_SETTINGS.items():  # set already: no restart
        monkeypatch.setenv(name, value)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["clinometer", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    yield run
    set_language(None)


def assert_refused(result, *words):
    """Exit code 2, one paragraph, no traceback, and the words that matter."""
    code, _, err = result
    assert code == 2, result
    assert "Traceback" not in err
    assert len(err.strip().split("\n\n")) == 1
    for word in words:
        assert str(word) in err, err
