"""Reentrant checkpoints, opened: gradients are on in their first run, so that calls inside are seen.

torch runs the block without gradients, and in the backward once more with them. In the first run a mode that
watches the forward would take everything in the block for a constant. Opened, the values, the random numbers
and the backward are what they were; only a graph is built for the block, and freed at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients.trace.torch_patches import patched
from clinometer.torch_internals.custom_functions import CheckpointFunction, without_modes
from clinometer.torch_support import offers


@contextmanager
def opened_checkpoints(seen: Callable[[Tensor], None] | None = None) -> Iterator[None]:
    """Inside, checkpoints are opened; `seen` is given each output of a block while it has its graph."""
    if not offers("checkpoints"):
        yield
        return

    def around_forward(forward: Any, ctx: Any, run_function: Any, *args: Any) -> Any:
        def run(*given: Any) -> Any:
            with torch.enable_grad():
                outputs = run_function(*given)
            if isinstance(outputs, Tensor):
                return _without_graph(outputs, seen)
            return tuple(_without_graph(out, seen) for out in outputs)

        result = forward(ctx, run, *args)
        ctx.run_function = run_function  # the backward runs the block as it is
        return result

    with patched(CheckpointFunction, "forward", around_forward):
        yield


def _without_graph(out: Any, seen: Callable[[Tensor], None] | None) -> Any:
    if not isinstance(out, Tensor) or out.grad_fn is None:
        return out
    if seen is not None:
        seen(out)
    with without_modes():  # this detach is ours: no mode should take it for the user's
        return out.detach()
