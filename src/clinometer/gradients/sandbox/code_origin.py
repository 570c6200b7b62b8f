"""Whose code a file is: the instrument's, torch's, the standard library's, a package's, or the user's."""

from __future__ import annotations

import os
import sys
import sysconfig
from functools import cache

import torch

_PACKAGE = os.path.dirname(os.path.abspath(str(sys.modules["clinometer"].__file__)))
_INSTRUMENT = tuple(
    os.path.join(_PACKAGE, room)
    for room in (
        "gradients",
        "monitoring",
        "distributed",
        "integrations",
        "record",
        "torch_internals",
        "clip_observers.py",
    )
)
"""What is never the user's code. A model of ours (`lm`) is a model like any other."""
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))
_STANDARD = {os.path.realpath(sysconfig.get_path(key)) for key in ("stdlib", "platstdlib")}
_INSTALLED = ("site-packages", "dist-packages")


@cache
def is_machinery(file: str) -> bool:
    """Whether a file belongs to torch, the standard library or the instrument."""
    if file.startswith("<"):  # "<string>", "<stdin>", "<ipython-input-3>" are the user's code
        return file.startswith(("<frozen ", "<@beartype"))
    path = os.path.abspath(file)
    if _within(path, _TORCH) or is_instrument(file):
        return True
    real = os.path.realpath(path)
    return any(
        _within(real, root) and not any(part in _INSTALLED for part in real[len(root) :].split(os.sep))
        for root in _STANDARD
    )


@cache
def is_instrument(file: str) -> bool:
    """Whether a file belongs to the instrument itself."""
    path = os.path.abspath(file)
    return any(_within(path, room) for room in _INSTRUMENT)


def is_installed(file: str) -> bool:
    """Whether a file belongs to an installed package, not to the user's own project."""
    return any(part in _INSTALLED for part in file.replace("\\", "/").split("/"))


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + os.sep)
