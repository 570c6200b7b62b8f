"""Reentrant checkpoints, opened: their first run has gradients on, so what happens inside can be seen.

torch runs the block without gradients and once more, with them, in the backward. Watchers of the forward
would take everything in the block for a constant. Opened, the values, the random numbers and the backward
are what they were; only a graph is built for the block, and let go at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clinometer.torch_internals.custom_functions import CheckpointFunction, without_modes
from clinometer.torch_internals.look_up import replace
from clinometer.torch_support import offers


@contextmanager
def opened_checkpoints(seen: Callable[[Tensor], None] | None = None) -> Iterator[None]:
    """Inside, checkpoints are opened; `seen` is given each output of a block while it has its graph."""
    if not offers("checkpoints"):
        yield
        return
    back = replace(CheckpointFunction, "forward", lambda forward: staticmethod(_opened(forward, seen)))
    try:
        yield
    finally:
        back()


def _opened(forward: Any, seen: Callable[[Tensor], None] | None) -> Callable[..., Any]:
    def opened_forward(ctx: Any, run_function: Any, preserve_rng_state: Any, *args: Any) -> Any:
        def run(*given: Any) -> Any:
            with torch.enable_grad():
                outputs = run_function(*given)
            if isinstance(outputs, Tensor):
                return _let_go(outputs, seen)
            return tuple(_let_go(out, seen) for out in outputs)

        result = forward.__func__(ctx, run, preserve_rng_state, *args)
        ctx.run_function = run_function  # the backward runs the block as it is
        return result

    return opened_forward


def _let_go(out: Any, seen: Callable[[Tensor], None] | None) -> Any:
    if not isinstance(out, Tensor) or out.grad_fn is None:
        return out
    if seen is not None:
        seen(out)
    with without_modes():  # this detach is ours: no mode should take it for the user's
        return out.detach()
