"""Muon: momentum, made orthogonal.

With g the gradient of a matrix, B its momentum, starting at zero:

    B ← μ B + (1−μ) g
    u = (1−μ) g + μ B                      (Nesterov's look ahead; without it u = B)
    θ ← θ − lr·λ·θ
    θ ← θ − lr·a(θ)·NS(u)                  a = 0.2·√max(rows, columns): the size of an AdamW update

NS(u) is near U Vᵀ where u = U S Vᵀ: every direction of the update gets the same length, also those that the
momentum hardly has. Newton–Schulz finds it by products alone. With X₀ = u / ‖u‖ (Frobenius), five times

    A = X Xᵀ,   X ← a X + (b A + c A²) X,   (a, b, c) = (3.4445, −4.7750, 2.0315)

Sources: Jordan et al. 2024 (the method and its numbers); Liu et al. 2025, §2.2 (the size).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clinometer.optim.eager_optimizer import EagerOptimizer
from clinometer.optim.fused_kernels import local_parts
from clinometer.optim.muon_sharded import by_rows, each_on_one_rank
from clinometer.torch_internals.kernels import muon_init_group

_JOINED = 2**18
"""Larger matrices keep the cores busy by themselves; smaller ones wait for the start of each product."""
_AT_ONCE = 2**22
"""Numbers in one batch: what is joined is copied."""


class Muon(EagerOptimizer, torch.optim.Muon):
    """torch.optim.Muon with the products of equal-shaped small matrices in one batch; the same bits.

    A Transformer has the same few shapes in every layer, so five steps of three products each become fifteen
    products for a shape instead of fifteen for a matrix (measured: docs/log.md). Arguments, state
    (`momentum_buffer`) and errors are torch's.
    """

    formula = "muon"
    """What it claims to compute, for `explain_step`, which holds it to that."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every matrix that has a gradient; returns what `closure`, if given, returns."""
        if muon_init_group is None:
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[Tensor] = []
            grads: list[Tensor] = []
            momenta: list[Tensor] = []
            muon_init_group(self, group, parameters, grads, momenta)
            alike: dict[Any, list[int]] = {}
            apart: dict[Any, list[int]] = {}
            for index, parameter in enumerate(parameters):
                if kind := by_rows(parameter):
                    apart.setdefault(kind, []).append(index)
                else:
                    alike.setdefault(_kind(index, parameter), []).append(index)
            for (_, mesh, _), indices in apart.items():
                for first in range(0, len(indices), mesh.size()):
                    chosen = indices[first : first + mesh.size()]
                    columns = ([column[i] for i in chosen] for column in (parameters, grads, momenta))
                    self._update_apart(group, mesh, *columns)
            for indices in alike.values():
                size = max(1, _AT_ONCE // max(1, parameters[indices[0]].numel()))
                for first in range(0, len(indices), size):
                    chosen = indices[first : first + size]
                    self._update(
                        group, *([column[i] for i in chosen] for column in (parameters, grads, momenta))
                    )
        return loss

    def _update(
        self, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor], momenta: list[Tensor]
    ) -> None:
        updates = _look_ahead(group, grads, momenta)
        directions = orthogonalised(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
        _move(group, parameters[0].shape, parameters, directions)

    def _update_apart(
        self,
        group: dict[str, Any],
        mesh: Any,
        parameters: list[Tensor],
        grads: list[Tensor],
        momenta: list[Tensor],
    ) -> None:
        """Equal-shaped matrices that ranks hold by rows, at most one a rank: each rank works on one.

        The rows travel to the rank that works on their matrix, and the direction's rows back: the same
        numbers as in one process, with its work divided.
        """
        rows, columns = parameters[0].shape
        parts = [local_parts(*three) for three in zip(parameters, grads, momenta, strict=True)]
        updates = _look_ahead(group, [part[1] for part in parts], [part[2] for part in parts])

        def orthogonal(whole: Tensor) -> Tensor:
            return orthogonalised([whole], group["ns_coefficients"], group["ns_steps"], group["eps"])[0]

        directions = each_on_one_rank(updates, (rows, columns), mesh, orthogonal)
        _move(group, parameters[0].shape, [part[0] for part in parts], directions)


def _look_ahead(group: dict[str, Any], grads: list[Tensor], momenta: list[Tensor]) -> list[Tensor]:
    momentum, updates = group["momentum"], []
    for grad, buffer in zip(grads, momenta, strict=True):
        buffer.lerp_(grad, 1 - momentum)
        updates.append(grad.lerp(buffer, momentum) if group["nesterov"] else buffer)
    return updates


def _move(
    group: dict[str, Any], shape: torch.Size, parameters: list[Tensor], directions: list[Tensor]
) -> None:
    lr = float(group["lr"])
    rate = lr * _size_factor(group["adjust_lr_fn"], *shape)
    for parameter, direction in zip(parameters, directions, strict=True):
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.add_(direction, alpha=-rate)


def orthogonalised(
    matrices: list[Tensor], coefficients: tuple[float, float, float], steps: int, eps: float
) -> list[Tensor]:
    """NS of each of some equal-shaped matrices [rows, columns], in bfloat16."""
    a, b, c = coefficients
    tall = matrices[0].size(0) > matrices[0].size(1)
    narrow = [m.to(torch.bfloat16) for m in matrices]
    # Each norm by itself: a sum over three dimensions adds in another order.
    norms = [m.norm().clamp(min=eps) for m in ([n.T for n in narrow] if tall else narrow)]
    if len(matrices) == 1:
        x, product, sum_of = (narrow[0].T if tall else narrow[0]) / norms[0], torch.mm, torch.addmm
    else:
        stacked = torch.stack(narrow)
        x = (stacked.mT if tall else stacked) / torch.stack(norms)[:, None, None]
        product, sum_of = torch.bmm, torch.baddbmm
    for _ in range(steps):
        gram = product(x, x.mT)
        x = sum_of(x, sum_of(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if tall else x
    return [x] if len(matrices) == 1 else list(x.unbind())


def _kind(index: int, parameter: Tensor) -> Any:
    """Matrices of one kind share a batch; a large one and a sharded one are a kind of their own."""
    if parameter.numel() > _JOINED or hasattr(parameter, "device_mesh"):
        return index
    return parameter.shape, parameter.device, parameter.dtype


def _size_factor(name: str | None, rows: int, columns: int) -> float:
    if name == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
