"""`scale_grad_by_freq`: a gradient that is divided on purpose, and so no derivative, left undivided.

nn.Embedding then divides each row's gradient by how often the row occurs in the batch.
"""

from __future__ import annotations

import inspect
import sys
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from clinometer.gradients.report.places import Where, user_frame

LOOKUPS = (F.embedding, F.embedding_bag)


def undivided(func: Any, args: Any, kwargs: Any) -> dict[str, Any] | None:
    """Returns the arguments by name, without the division; None if the call does not divide."""
    if len(args) <= 2 and not kwargs:
        return None
    given = signature(func).bind(*args, **kwargs).arguments
    return {**given, "scale_grad_by_freq": False} if given.get("scale_grad_by_freq") else None


@cache
def signature(func: Any) -> inspect.Signature:
    """Of a lookup, which is called at every forward: reading it takes as long as the call."""
    return inspect.signature(func)


class UndividedLookups(TorchFunctionMode):
    """Inside, no gradient is divided by frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.where: dict[int, Where | None] = {}
        """id of the weight → the line that looks it up."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LOOKUPS and (given := undivided(func, args, kwargs)) is not None:
            self.where.setdefault(id(given["weight"]), user_frame(sys._getframe(1), op=func.__name__))
            args, kwargs = (), given
        return func(*args, **kwargs)
