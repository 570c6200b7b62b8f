"""Memory that runs out is answered with the setting to lower and the number that fits."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from clinometer.training.run import out_of_memory
from clinometer.training.run.out_of_memory import is_out_of_memory, too_little_memory
from tests.training.conftest import SMALL

GIB = 1 << 30
FAILED = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes.")


def told(monkeypatch, config, *, limit, taken, parameters, error=FAILED):
    monkeypatch.setattr(out_of_memory, "_limit_and_taken", lambda device: (limit, taken))
    return too_little_memory(error, config, parameters, "cpu")


def with_micro(config, size):
    return replace(config, training=replace(config.training, batch_size=64, micro_batch_size=size))


def test_the_micro_batch_that_fits_is_named(config, monkeypatch):
    # 16 sequences wanted 8 GiB more than the 4 that were held, of which 1 GiB is the model's: 11 in all.
    error = told(monkeypatch, with_micro(config, 16), limit=8 * GIB, taken=4 * GIB, parameters=GIB // 16)
    assert (error.key, error.values["fits"], error.values["now"]) == ("memory.batch", 8, 16)
    assert "from 16 to 8" in error.render("en")
    error = told(monkeypatch, with_micro(config, 16), limit=4 * GIB, taken=4 * GIB, parameters=GIB // 16)
    assert error.values["fits"] == 2  # 0.8 · 16 · (4 − 1) / 11 = 3.5, and 3 does not divide 64


def test_one_sequence_that_does_not_fit_has_half_the_context(config, monkeypatch):
    error = told(monkeypatch, with_micro(config, 1), limit=8 * GIB, taken=GIB, parameters=10)
    assert (error.key, error.values["context"]) == ("memory.context", 8)


def test_a_model_larger_than_the_memory_is_told_apart(config, monkeypatch):
    error = told(monkeypatch, with_micro(config, 16), limit=GIB, taken=GIB, parameters=GIB)
    assert error.key == "memory.model"
    assert "1,073,741,824" in error.render("zh")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError("Unable to allocate 7.45 GiB for an array"), True),
        (torch.OutOfMemoryError("CUDA out of out_of_memory. Tried to allocate 20.00 MiB."), True),
        (FAILED, True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_want_of_memory_and_what_is_not(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (str(FAILED), 8 * GIB),
        ("CUDA out of out_of_memory. Tried to allocate 20.50 MiB. GPU 0 has", int(20.5 * (1 << 20))),
        ("Unable to allocate 2.00 GiB for an array with shape (1,)", 2 * GIB),
        ("no memory", 0),
    ],
)
def test_how_much_was_asked_for_is_read_from_the_error(text, size):
    assert out_of_memory._asked(RuntimeError(text)) == size


def test_a_step_that_really_does_not_fit_says_what_does(corpus):
    """Under a limit on the address space, as `ulimit -v` sets it."""
    code = (
        "import resource, sys, torch\n"
        "import clinometer.commands.train, clinometer.cli\n"
        "taken = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30),) * 2)\n"
        "sys.argv = ['clinometer', *sys.argv[1:]]\n"
        "clinometer.commands.helpers.process_settings.restart_with_settings = lambda: None\n"
        "clinometer.cli.main()\n"
    )
    settings = [s for s in SMALL if "batch" not in s and "context" not in s]
    settings += ["--model.context-length=512", "--training.batch-size=2048", "--training.steps=1"]
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--corpus", corpus, "--run", corpus.parent / "run", *settings],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert "training.micro_batch_size from 2048 to" in done.stderr
