"""Frames of torch's own code, told apart by their names, and whether its compiler is loaded."""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any

import torch
from torch.nn.utils import parametrizations

_PARAMETRIZATIONS = str(parametrizations.__file__)
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


def compiler_is_loaded() -> bool:
    """Whether torch.compile may have compiled anything; to load it takes a second."""
    return "torch._dynamo" in sys.modules
