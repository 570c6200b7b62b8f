"""A run's folder: everything to read it, continue it, or do it again.

config.toml         the complete configuration; `clinometer train --config` takes it
environment.json    machine, versions, and what every "auto" came to
tokenizer/          tokenizer.json and the files that transformers needs
checkpoints/        see checkpoint.py
metrics.jsonl       one line a step, one a validation
skipped.jsonl       the batches whose loss or gradient was not finite, if any
samples/            text the model wrote
"""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from clinometer import __version__
from clinometer.foreign_files import parse_json, refuse_links
from clinometer.messages import InputError
from clinometer.training.settings.config import RunConfig, config_from
from clinometer.training.settings.settings_file import read_toml
from clinometer.whole_files import write_whole

_WRITTEN = (".lock", "checkpoints", "metrics.jsonl", "skipped.jsonl", "samples", "corpus.txt", "tokens")


class RunFolder:
    """The paths of a run, and its lock while it is written: one trainer at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.toml"
        self.environment_file = path / "environment.json"
        self.tokenizer = path / "tokenizer"
        self.checkpoints = path / "checkpoints"
        self.metrics_file = path / "metrics.jsonl"
        self.skipped_file = path / "skipped.jsonl"
        self.samples = path / "samples"
        self._lock = FileLock(str(path / ".lock"), thread_local=False)

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunFolder:
        """A new folder with its config.toml, whose paths are full ones.

        Raises `InputError` if there is something at `path` already.
        """
        if os.path.isfile(path / "config.toml"):
            raise InputError("run.exists", path=path)
        if os.path.exists(path) and (not path.is_dir() or not _is_unused(path)):
            raise InputError("run.not_empty", path=path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path)
            folder.lock()
            folder.checkpoints.mkdir(exist_ok=True)
            write_whole(folder.config_file, with_full_paths(config).to_toml())
        except OSError as error:
            raise InputError("run.not_writable", path=path, reason=error.strerror) from None
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The folder of a run that was started. Raises `InputError` if it is not a run."""
        if not os.path.exists(path):
            raise InputError("run.missing", path=path)
        if not (path / "config.toml").is_file():
            raise InputError("run.not_a_run", path=path)
        return cls(path)

    @property
    def config(self) -> RunConfig:
        return config_from(read_toml(self.config_file))

    def lock(self) -> None:
        """Lock the folder until this process ends. Raises `InputError` if another trainer has it."""
        refuse_links(self.path, _WRITTEN)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError("run.in_use", path=self.path) from None
        except OSError as error:
            raise InputError("run.not_writable", path=self.path, reason=error.strerror) from None

    def unlock(self) -> None:
        self._lock.release()

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The recorded rows, oldest first; a line cut short by a kill is left out.

        Raises `InputError` with the number of a line that is no row.
        """
        if self.metrics_file.exists():
            with self.metrics_file.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.endswith(b"\n"):
                        yield self._row(number, line)

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = parse_json(line.decode("utf-8"))
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError("run.line_broken", path=self.metrics_file, line=number)
        return row


def _is_unused(path: Path) -> bool:
    """Whether a folder holds nothing, or only what a trainer killed in its first instant left there."""
    ours = {".lock", "checkpoints"}
    return all(
        (entry.name in ours or entry.name.startswith(".config.toml."))
        and not (entry.is_dir() and any(entry.iterdir()))
        for entry in path.iterdir()
    )


def with_full_paths(config: RunConfig) -> RunConfig:
    """The same configuration with full paths: it means the same in any working folder."""
    data = {}
    for name in ("corpus", "tokenizer"):
        value = getattr(config.data, name)
        # The words with a meaning of their own win over a file that has such a name.
        if value not in ("python", "-", "bpe", "bytes") and (os.path.exists(value) or "*" in value):
            data[name] = str(Path(value).absolute())
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def describe_environment() -> dict[str, Any]:
    """Machine and versions, without anything that names the person or the folder."""
    from clinometer.training.settings.precision import processor_name

    packages = {"clinometer": __version__}  # a checkout may be ahead of what is installed
    for name in ("torch", "numpy", "tokenizers", "safetensors"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "?"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "byte_order": sys.byteorder,
        "packages": packages,
    }
