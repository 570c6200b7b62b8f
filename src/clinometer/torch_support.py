"""Which versions of torch and Python the tests ran on, and what the installed torch does not offer."""

from __future__ import annotations

import platform
import warnings
from functools import cache

import torch

from clinometer.messages import say
from clinometer.torch_internals import custom_functions, kernels, modules, nodes, tensors
from clinometer.torch_internals.look_up import MISSING

TESTED_TORCH = ("2.10.0", "2.13.0", "2.14.1", "2.15.0")
"""The oldest that may be installed, the one that `make` installs, and the newer ones."""
TESTED_PYTHON = ("3.11", "3.12", "3.13")
PROBED = (custom_functions, kernels, modules, nodes, tensors)
"""The modules whose import fills `MISSING`."""


def is_tested(release: str = torch.__version__, python: str = platform.python_version()) -> bool:
    """Whether the tests ran on this torch, be it a CPU or a GPU build of it, and on this Python."""
    return release.partition("+")[0] in TESTED_TORCH and python.rpartition(".")[0] in TESTED_PYTHON


def missing(language: str | None = None) -> list[str]:
    """A sentence for each feature that this torch has something missing for."""
    return [say(f"torch.{feature}", language, torch=torch.__version__) for feature in MISSING]


def offers(*features: str) -> bool:
    """Whether this torch has what these features need; if not, warns of each, once, in a sentence."""
    lacking = [feature for feature in features if feature in MISSING]
    for feature in lacking:
        _warn_of(feature)
    return not lacking


@cache
def _warn_of(feature: str) -> None:
    warnings.warn(say(f"torch.{feature}", torch=torch.__version__), UserWarning, stacklevel=4)
