"""Frames of torch's own code, told apart by their names, and what is known of its compiler."""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any

import torch
from torch import overrides
from torch.nn.utils import parametrizations
from torch.utils import _python_dispatch

_PARAMETRIZATIONS = str(parametrizations.__file__)
_MODE_STACKS = {str(overrides.__file__), str(_python_dispatch.__file__)}
_decorated: Any = torch.no_grad()(lambda: None)
_DECORATORS = _decorated.__code__.co_filename


def switches_grad_mode(code: CodeType) -> bool:
    """Whether a frame of torch's is that of a function decorated with no_grad or the like."""
    return code.co_filename == _DECORATORS  # its name says which decorator from torch 2.15 on


def is_scaler(code: CodeType) -> bool:
    """Whether a frame is GradScaler's."""
    return code.co_filename.endswith("grad_scaler.py")


def is_clipping(code: CodeType) -> bool:
    """Whether a frame is that of clip_grad_norm_."""
    return code.co_name == "clip_grad_norm_"


def steps_an_optimizer(frame: FrameType | None) -> bool:
    """Whether a frame runs inside the step of an optimizer, torch's or one that inherits from it."""
    while frame is not None:
        if frame.f_code.co_name == "step" and isinstance(frame.f_locals.get("self"), torch.optim.Optimizer):
            return True
        frame = frame.f_back
    return False


def is_parametrization(frame: FrameType | None) -> bool:
    """Whether a frame is one of torch's own parametrizations."""
    return frame is not None and frame.f_code.co_filename == _PARAMETRIZATIONS


def stacks_modes(code: CodeType) -> bool:
    """Whether a frame is of those that take a mode from torch's stack for a while and put it back."""
    return code.co_filename in _MODE_STACKS


def compiler_is_loaded() -> bool:
    """Whether torch.compile may have compiled anything; to load it takes a second."""
    return "torch._dynamo" in sys.modules


def compiled_call_hook() -> tuple[Any, str] | None:
    """A module and the name of a function in it, through which every call of something compiled passes.

    It is given a callback: None or False where nothing is to be compiled. There is no such function (None) if
    the compiler is not loaded, or this torch has another one.
    """
    place = sys.modules.get("torch._dynamo.eval_frame")
    name = "_callback_from_stance"
    return (place, name) if hasattr(place, name) else None
