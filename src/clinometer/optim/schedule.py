"""Learning rates as pure functions of the step.

`step` t is a plain number and nothing is remembered, so resuming needs no schedule state. With a warmup the
learning rate is 0 at t = 0; a training loop that counts its steps from 0 asks for t = step + 1: its first
step then already moves, and its last (t = total_steps) is made at `min_lr`.
"""

from __future__ import annotations

import math

from clinometer.messages import InputError
from clinometer.optim.argument_checks import require_nonnegative


def cosine_schedule(
    step: float, max_lr: float, min_lr: float, warmup_steps: float, total_steps: float
) -> float:
    """Linear warmup, then half a cosine down to `min_lr`, then `min_lr`.

        t < Tw:        t/Tw · max
        Tw ≤ t ≤ Tc:   min + ½ (1 + cos(π (t−Tw)/(Tc−Tw))) (max − min)
        t > Tc:        min

    with Tw = `warmup_steps`, Tc = `total_steps`, counted in steps; exactly `max_lr` at Tw and exactly
    `min_lr` at Tc (if Tw = Tc: `max_lr` there, `min_lr` from then on). Raises `InputError` unless all are
    finite and ≥ 0, min ≤ max and Tw ≤ Tc. Source: Loshchilov & Hutter 2017 (SGDR, eq. 5), with warmup.
    """
    _check(step, max_lr, warmup_steps, min_lr, total_steps)
    if step < warmup_steps:
        return step / warmup_steps * max_lr
    if step > total_steps:
        return min_lr
    if total_steps == warmup_steps:
        return max_lr
    height = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))
    # A weighted mean instead of min + height·(max − min): that one misses max_lr by a rounding.
    return height * max_lr + (1 - height) * min_lr


def constant_schedule(step: float, max_lr: float, warmup_steps: float) -> float:
    """Linear warmup, then `max_lr`: t/Tw · max while t < Tw. Raises `InputError` like `cosine_schedule`."""
    _check(step, max_lr, warmup_steps)
    return step / warmup_steps * max_lr if step < warmup_steps else max_lr


def warmup_stable_decay_schedule(
    step: float, max_lr: float, min_lr: float, warmup_steps: float, total_steps: float, decay_steps: float
) -> float:
    """Linear warmup, `max_lr`, and a straight line down to `min_lr` over the last `decay_steps` steps.

        t < Tw:              t/Tw · max
        Tw ≤ t ≤ Tc − Td:    max
        Tc − Td < t ≤ Tc:    min + (Tc−t)/Td · (max − min)
        t > Tc:              min

    Exactly `max_lr` at Tc − Td and exactly `min_lr` at Tc. Raises `InputError` like `cosine_schedule`, and if
    Tw + Td > Tc. Source: Hu et al. 2024 (MiniCPM, §4.2).
    """
    _check(step, max_lr, warmup_steps, min_lr, total_steps)
    require_nonnegative("decay_steps", decay_steps, "total_steps // 10")
    if warmup_steps + decay_steps > total_steps:
        raise InputError("optim.decay_steps", warmup=warmup_steps, decay=decay_steps, total=total_steps)
    if step < warmup_steps:
        return step / warmup_steps * max_lr
    if step <= total_steps - decay_steps:
        return max_lr
    height = max(0.0, (total_steps - step) / decay_steps) if decay_steps else 0.0
    return height * max_lr + (1 - height) * min_lr


def _check(
    step: float,
    max_lr: float,
    warmup_steps: float,
    min_lr: float | None = None,
    total_steps: float | None = None,
) -> None:
    require_nonnegative("step", step, "0")
    require_nonnegative("max_lr", max_lr, "1e-3")
    require_nonnegative("warmup_steps", warmup_steps, "100")
    if min_lr is not None:
        require_nonnegative("min_lr", min_lr, "0.1 * max_lr")
        if min_lr > max_lr:
            raise InputError("optim.min_lr", min_lr=min_lr, max_lr=max_lr)
    if total_steps is not None:
        require_nonnegative("total_steps", total_steps, "1000")
        if warmup_steps > total_steps:
            raise InputError("optim.warmup_steps", warmup=warmup_steps, total=total_steps)
