"""Cross-entropy of a large vocabulary for a compiled training step: loss and gradients, a chunk at a time.

For each chunk of positions, with z = x Wᵀ its logits:

    loss += logsumexp(z) - z[target]        dz = softmax(z) - onehot(target)
    dx    = dz W                            dW += dzᵀ x

so that neither the logits nor their gradient are ever whole, and nothing is computed twice. As in
`functional.linear_cross_entropy` there is no double backward and no forward mode; unlike there the products
are in bfloat16 under autocast (the sums of dW in float32), and what is between the products can be one
compiled pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from clinometer.lm import compiled_step, functional

POSITIONS = 512
"""A chunk: 51 MB of bf16 logits at a vocabulary of 50,257. Smaller ones spend more on adding up dW."""


def chunked_cross_entropy(
    x_BSD: Tensor,
    weight_VD: Tensor,
    targets_BS: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    onednn: bool = False,
    compiled: bool = False,
) -> Tensor:
    """`cross_entropy(linear(x, weight), targets)`; `reduction` is "mean" or "sum".

    Targets outside 0 … V-1 other than `ignore_index` must be rejected by the caller. A second backward
    through the same loss raises RuntimeError. `compiled`: what is between the products in one compiled pass.
    """
    kind = x_BSD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BSD.dtype
    with torch.autocast(kind, enabled=False):
        x, targets = x_BSD.flatten(0, -2), targets_BS.flatten().long()
        how = (dtype, onednn, compiled, torch.is_grad_enabled())
        total: Tensor = _Chunked.apply(x, weight_VD, targets, ignore_index, *how)  # pyright: ignore
        if reduction == "sum":
            return total
        return total / (targets != ignore_index).sum()


def head_loss(x_BSD: Tensor, head_weight: Tensor, targets: Tensor, reduction: str, *, onednn: bool) -> Tensor:
    """From the final norm to the loss."""
    functional.check_targets(targets, head_weight.shape[0])
    return chunked_cross_entropy(
        x_BSD, head_weight, targets, reduction=reduction, onednn=onednn, compiled=True
    )


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        dtype: torch.dtype,
        onednn: bool,
        compiled: bool,
        with_gradients: bool,
    ) -> Tensor:
        between = _compiled() if compiled else _loss_and_gradient
        w = weight.to(dtype)
        total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        dx = torch.empty_like(x) if with_gradients and ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight) if with_gradients and ctx.needs_input_grad[1] else None
        for first in range(0, len(x), POSITIONS):
            part = slice(first, first + POSITIONS)
            x_part = x[part].to(dtype)
            loss, dz = between(compiled_step.linear(x_part, w, onednn=onednn), targets[part], ignore_index)
            total += loss
            if dx is not None:
                dx[part] = compiled_step.linear(dz, w.t(), onednn=onednn)
            if dw is not None and dw.dtype == dtype:
                dw.addmm_(dz.t(), x_part)
            elif dw is not None:
                dw += dz.t() @ x_part
        ctx.gradients = dx, dw
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        if ctx.gradients is None:
            raise RuntimeError("chunked_cross_entropy: backward a second time through the same loss")
        gradients, ctx.gradients = ctx.gradients, None
        # In place: dW is as large as the weight, and no other code has a reference to it.
        dx, dw = (None if grad is None else grad.mul_(d_total) for grad in gradients)
        return dx, dw, *[None] * 6


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_loss_and_gradient, dynamic=True)


def _loss_and_gradient(z: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Sum of the positions' losses, and its gradient with respect to the logits z, in z's dtype."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    log_sum = wide.logsumexp(-1, keepdim=True)
    counts = (targets != ignore_index)[:, None]
    at_target = torch.arange(z.shape[-1], device=z.device) == targets[:, None]
    dz = (torch.exp(wide - log_sum) - at_target.to(wide.dtype)) * counts
    chosen = wide.gather(-1, targets[:, None].clamp(min=0))
    return ((log_sum - chosen) * counts).sum(), dz.to(z.dtype)
