"""Whether the gradients an optimizer got were clipped on the way, told with certainty or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients.step.optimizer_state import wide
from clinometer.gradients.trace.torch_patches import patched


def clipping_factor(raw: Tensor, used: Tensor) -> float | None:
    """‖used‖/‖raw‖ if `used` is `raw` clipped; None if it is not, or if they are the same.

    Clipped means: every entry times one factor below 1, within rounding; or no entry beyond a largest value,
    and those within it left alone. Anything else is another gradient, such as one of an earlier batch. A
    factor of 1/2, 1/4, … is not clipping but a GradScaler, whose scales are powers of two.
    """
    if torch.equal(raw.nan_to_num(), used.nan_to_num()):
        return None
    before, after = wide(raw), wide(used)
    norm = float(torch.linalg.vector_norm(before))
    if not norm or not math.isfinite(norm):
        return None
    factor = float((before * after).sum()) / norm**2
    eps = torch.finfo(used.dtype).eps
    # A number below the smallest normal one is rounded to a step of its own.
    allowed = 4 * eps * after.abs() + 2 * torch.finfo(used.dtype).tiny
    if 0 < factor < 1 - 4 * eps and bool(((after - factor * before).abs() <= allowed).all()):
        mantissa = math.frexp(factor)[0]
        return None if min(abs(mantissa - 0.5), abs(mantissa - 1.0)) < 4 * eps else factor
    largest = after.abs().max()
    if bool((after == before.clamp(-largest, largest)).all()):
        return float(torch.linalg.vector_norm(after)) / norm
    return None


@contextmanager
def after_unscaling(optimizer: Any, call: Callable[[], None]) -> Iterator[None]:
    """Inside, `call` is called whenever a GradScaler has unscaled this optimizer's gradients."""

    def around_unscale(unscale: Any, scaler: Any, unscaled: Any) -> Any:
        result = unscale(scaler, unscaled)
        while unscaled is not None:
            if unscaled is optimizer:
                call()
                break
            unscaled = getattr(unscaled, "optimizer", None)
        return result

    with patched(torch.amp.GradScaler, "unscale_", around_unscale):
        yield
