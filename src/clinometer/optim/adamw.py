"""AdamW: Adam with decoupled weight decay.

With g the gradient, t counted from 1, m and v starting at zero:

    m ← β₁ m + (1−β₁) g
    v ← β₂ v + (1−β₂) g²
    lr_t = lr · √(1−β₂ᵗ) / (1−β₁ᵗ)
    θ ← θ − lr_t · m / (√v + ε)
    θ ← θ − lr · λ · θ

m is a running mean of the gradient and v of its square, so m/√v is a gradient whose size no longer depends
on the loss's units: about ±1 for a weight that is pushed the same way at every step, near 0 for one that is
pushed to and fro. Both begin at zero and so are too small at first, by the factors 1−β₁ᵗ and 1−β₂ᵗ;
lr_t makes up for that. The last line shrinks every weight by the same fraction, and passes by m and v
("decoupled"): a penalty added to the gradient would be divided by √v, and large gradients would escape it.

Sources: Kingma & Ba 2015 (the order of §2, "a more efficient version"); Loshchilov & Hutter 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from clinometer.messages import InputError
from clinometer.optim.argument_checks import require_betas, require_nonnegative
from clinometer.optim.eager_optimizer import EagerOptimizer
from clinometer.optim.fused_kernels import local_parts, shared_kernel, with_grad, with_small_joined
from clinometer.torch_internals.kernels import foreach_add_, fused_adamw_


def adamw_reference_(
    theta: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step of one tensor, in place: the module's formula line by line.

    `step` is t, the count that includes this step. Whatever the tensors' dtype, the step is computed in
    float64 (float32 on devices without it) and rounded once, when it is stored.
    """
    precision = torch.float32 if theta.device.type == "mps" else torch.float64
    g, m, v, new_theta = (tensor.to(precision) for tensor in (grad, exp_avg, exp_avg_sq, theta))

    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    lr_t = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    new_theta = new_theta - lr_t * m / (v.sqrt() + eps)
    new_theta = new_theta - lr * weight_decay * new_theta

    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    theta.copy_(new_theta)


def adamw_fused_(
    thetas: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """The same step of many tensors in one call of torch's kernel, which reads and writes each number once.

    torch's kernel is AdamW in another form, so it gets other numbers (lr', λ', ε'). It computes

        θ ← θ − lr'·λ'·θ − lr'/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε')

    and ours, written in one line, is θ ← (1−lr·λ)·(θ − lr_t·m/(√v+ε)). They are equal, term by term, when
    - lr' = lr·(1−lr·λ): decay after the update shrinks the update too;
    - λ' = lr·λ/lr': what multiplies θ is then still lr·λ;
    - ε' = ε/√(1−β₂ᵗ): torch adds ε after the bias correction, and √(1−β₂ᵗ) multiplies it back.

    All tensors share device, dtype and step count. lr·λ = 1 belongs to the reference: lr' is 0, λ' infinite.
    """
    # Filled on the device: nothing is copied from the host, so nothing waits.
    count = torch.full((), float(step), dtype=torch.float32, device=thetas[0].device)
    fused_lr = lr * (1 - lr * weight_decay)
    fused_adamw_(
        thetas,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [count] * len(thetas),
        lr=fused_lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=lr * weight_decay / fused_lr if lr != 0 else 0.0,
        eps=eps / math.sqrt(1 - beta2**step),
        amsgrad=False,
        maximize=False,
    )


class AdamW(EagerOptimizer):
    """AdamW in the form above; state keys `step`, `exp_avg`, `exp_avg_sq` are torch.optim.AdamW's.

    `lr`: step size, in units of the weights; a one-element tensor is read on the host at each step.
    `betas`: (β₁, β₂). `eps`: ε, in units of the gradient. `weight_decay`: λ; a step takes away lr·λ·θ.
    `fused`: False takes the readable reference everywhere; None takes torch's kernel where there is one.
    A parameter whose grad is None is skipped: neither decay nor step count.

    Raises `InputError` for numbers out of range, for sparse and complex gradients (before anything moves),
    and on loading a state with `amsgrad` or `maximize`, which this form does not have.
    """

    formula = "adamw-after"
    """What it claims to compute, for `explain_step`, which holds it to that."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        complete = {**self.defaults, **param_group}
        require_nonnegative("lr", complete["lr"], "1e-3")
        require_betas(complete["betas"])
        require_nonnegative("eps", complete["eps"], "1e-8")
        require_nonnegative("weight_decay", complete["weight_decay"], "0.01")
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("fused", None)
            for variant in ("amsgrad", "maximize"):
                if group.get(variant):
                    raise InputError("optim.variant", variant=variant)
        for parameter_state in self.state.values():
            # torch's fused AdamW keeps its counts on the device; ours are read at every step.
            if "step" in parameter_state:
                parameter_state["step"] = torch.as_tensor(
                    parameter_state["step"], dtype=torch.float32, device="cpu"
                )

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
        numbers = {
            "lr": float(group["lr"]),
            "beta1": float(group["betas"][0]),
            "beta2": float(group["betas"][1]),
            "eps": float(group["eps"]),
            "weight_decay": float(group["weight_decay"]),
        }
        kernel_allowed = group["fused"] is not False and fused_adamw_ is not None
        kernel_allowed = kernel_allowed and numbers["lr"] * numbers["weight_decay"] != 1

        states = [self._state_of(parameter) for parameter, _ in pairs]
        counts = [state["step"] for state in states]
        if counts:
            foreach_add_(counts, 1)

        together: dict[tuple[Hashable, int], list[tuple[Tensor, ...]]] = {}
        for (parameter, grad), state in zip(pairs, states, strict=True):
            exp_avg, exp_avg_sq, step = state["exp_avg"], state["exp_avg_sq"], int(state["step"].item())
            parameter, grad, exp_avg, exp_avg_sq = local_parts(parameter, grad, exp_avg, exp_avg_sq)
            if not parameter.numel():  # other ranks hold all of it
                continue
            kernel = shared_kernel(parameter, grad, exp_avg, exp_avg_sq) if kernel_allowed else None
            if kernel is None:
                adamw_reference_(parameter, grad, exp_avg, exp_avg_sq, step, **numbers)
            else:
                together.setdefault((kernel, step), []).append((parameter, grad, exp_avg, exp_avg_sq))

        for (_, step), batch in together.items():
            columns = [list(column) for column in zip(*batch, strict=True)]
            with_small_joined(partial(adamw_fused_, step=step, **numbers), columns)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state
