"""Stochastic gradient descent.

    θ ← θ − lr · g

and with weight decay λ and momentum μ (b starts at zero):

    g ← g + λ θ
    b ← μ b + g
    θ ← θ − lr · b              Nesterov: θ ← θ − lr · (g + μ b)

Sources: Robbins & Monro 1951; Sutskever et al. 2013, in torch.optim.SGD's form (lr outside of the buffer).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from clinometer.messages import InputError
from clinometer.optim.argument_checks import require_fraction, require_nonnegative
from clinometer.optim.eager_optimizer import EagerOptimizer
from clinometer.optim.fused_kernels import local_parts, shared_kernel, widened, with_grad, with_small_joined
from clinometer.torch_internals.kernels import fused_sgd_


def sgd_reference_(
    theta: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> None:
    """One SGD step of one tensor, in place; `momentum_buffer` is None exactly when `momentum` is 0.

    float16 and bfloat16 are computed in float32 and rounded once, when they are stored.
    """
    g, new_theta = widened(grad), widened(theta)

    if weight_decay != 0:
        g = g.add(new_theta, alpha=weight_decay)
    if momentum_buffer is not None:
        b = momentum * widened(momentum_buffer) + g
        momentum_buffer.copy_(b)
        g = g.add(b, alpha=momentum) if nesterov else b
    theta.copy_(new_theta.add(g, alpha=-lr))


def sgd_fused_(
    thetas: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor] | None = None,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> None:
    """The same step of many tensors in one call of torch's kernel, which is SGD in this very form."""
    fused_sgd_(
        thetas,
        grads,
        momentum_buffers or [],
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        dampening=0.0,
        maximize=False,
        is_first_step=False,
    )


class SGD(EagerOptimizer):
    """SGD in the form above; the state key `momentum_buffer` is torch.optim.SGD's.

    `lr`: step size, weights per gradient; a one-element tensor is read on the host at each step.
    `momentum`: μ, in [0, 1). `nesterov`: needs μ > 0. `weight_decay`: λ, added to the gradient as λθ.
    `fused`: False takes the readable reference everywhere; None takes torch's kernel where there is one.
    A parameter whose grad is None is skipped.

    Raises `InputError` for numbers out of range, for sparse and complex gradients (before anything moves),
    and on loading a state with `dampening` or `maximize`, which this form does not have.
    """

    formula = "sgd"
    """What it claims to compute, for `explain_step`, which holds it to that."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "dampening": 0.0,  # torch.optim.SGD needs the key in a state dict
                "fused": fused,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        complete = {**self.defaults, **param_group}
        require_nonnegative("lr", complete["lr"], "0.1")
        require_fraction("momentum", complete["momentum"], "0.9")
        require_nonnegative("weight_decay", complete["weight_decay"], "0")
        if complete["nesterov"] and not complete["momentum"]:
            raise InputError("optim.nesterov", value=complete["momentum"])
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("fused", None)
            for variant in ("dampening", "maximize"):
                if group.get(variant):
                    raise InputError("optim.variant", variant=variant)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what `closure`, if given, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, with_grad(group)) for group in self.param_groups]
        for group, pairs in work:
            self._update(group, pairs)
        return loss

    def _update(self, group: dict[str, Any], pairs: list[tuple[Tensor, Tensor]]) -> None:
        numbers: dict[str, Any] = {
            "lr": float(group["lr"]),
            "momentum": float(group["momentum"]),
            "nesterov": bool(group["nesterov"]),
            "weight_decay": float(group["weight_decay"]),
        }

        together: dict[Hashable, list[tuple[Tensor, ...]]] = {}
        for parameter, grad in pairs:
            buffers: list[Tensor] = []
            if numbers["momentum"] != 0:
                state = self.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(
                        parameter, memory_format=torch.preserve_format
                    )
                buffers = [state["momentum_buffer"]]
            parameter, grad, *buffers = local_parts(parameter, grad, *buffers)
            if not parameter.numel():  # other ranks hold all of it
                continue
            kernel = _kernel(parameter, grad, *buffers) if group["fused"] is not False else None
            if kernel is None:
                sgd_reference_(parameter, grad, *buffers, **numbers)
            else:
                together.setdefault(kernel, []).append((parameter, grad, *buffers))

        for batch in together.values():
            columns = [list(column) for column in zip(*batch, strict=True)]
            with_small_joined(partial(sgd_fused_, **numbers), columns)


def _kernel(parameter: Tensor, *others: Tensor) -> Hashable | None:
    # No _fused_sgd_ up to torch 2.15 has a rule for DTensors. On the CPU, those up to 2.13 are wrong in half
    # precision (a test shows it), though not for float32 and float64.
    half_on_cpu = parameter.device.type == "cpu" and parameter.dtype in (torch.float16, torch.bfloat16)
    if fused_sgd_ is None or half_on_cpu or hasattr(parameter, "device_mesh"):
        return None
    return shared_kernel(parameter, *others)
