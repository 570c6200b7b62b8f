"""The norm of all gradients, and clipping by it.

    total = √ Σ_t ‖g_t‖²          g_t ← g_t · min(1, max_norm / (total + 1e-6))

Norms are float64, because a float32 sum of squares is wrong at both ends: torch's norm of one 16 M-entry
tensor on the CPU is off by up to 1 %, and squares overflow from |g| ≈ 1e19 on and vanish below 1e-19.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clinometer.clip_observers import observers
from clinometer.distributed.reduce import ShardReduction
from clinometer.distributed.sharded_tensors import is_sharded, local
from clinometer.messages import InputError
from clinometer.optim.fused_kernels import refuse_unusual
from clinometer.torch_internals.kernels import foreach_mul_, foreach_norm

_ROW = (64, 65536)  # entries that are summed in float32 before float64 takes over: error below 1e-5
_TRUSTED = 1e-15  # a smaller float32 norm may have lost squares to underflow


class GradientNorms(NamedTuple):
    """L2 norms in float64: `per_tensor` [number of gradients], in the parameters' order, and `total` []."""

    per_tensor: Tensor
    total: Tensor


@torch.no_grad()
def gradient_norms(parameters: Tensor | Iterable[Tensor]) -> GradientNorms:
    """The L2 norm of each gradient and of all together, in the gradients' units; nothing is changed.

    Parameters without a gradient are left out, and a gradient that comes twice counts once. Everything is on
    the first gradient's device, without waiting for it. DTensors give the norms of the full tensors, equal on
    all ranks, for one collective (every rank calls, with the same parameters); plain tensors beside them
    count as copies. Raises `InputError` on sparse and complex gradients.
    """
    return _norms(*_distinct_gradients(parameters))


@torch.no_grad()
def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients together so that their total norm is at most `max_norm`; returns the norm before.

    A total that is not finite leaves the gradients as they are, for the caller to see and to skip: scaling
    would spread the NaN to every tensor. `max_norm` = inf only measures. Of sharded gradients (FSDP2, tensor
    parallel) the total is that of the full ones: a plain tensor, equal on all ranks. Raises `InputError`
    unless max_norm > 0, and on sparse and complex gradients. Source: Pascanu et al. 2013, §3.2; the 1e-6 is
    torch's.
    """
    if not (isinstance(max_norm, (int, float)) and max_norm > 0):
        raise InputError("optim.max_norm", value=max_norm)
    grads, absent = _distinct_gradients(parameters)
    total = _norms(grads, absent).total
    if grads and max_norm != math.inf:
        for observe in observers:
            observe(grads, total, max_norm)
        _scale_(grads, total, max_norm)
    return total


def _distinct_gradients(
    parameters: Tensor | Iterable[Tensor],
) -> tuple[list[Tensor], list[tuple[int, Tensor]]]:
    """The gradients; and each DTensor that has none, with its place among them: other ranks may have some."""
    distinct: dict[int, Tensor] = {}
    absent: dict[int, tuple[int, Tensor]] = {}
    for index, parameter in enumerate([parameters] if isinstance(parameters, Tensor) else parameters):
        grad = parameter.grad
        if grad is not None:
            refuse_unusual(grad, f"parameters[{index}]")
            distinct[id(grad)] = grad
        elif is_sharded(parameter):
            absent.setdefault(id(parameter), (len(distinct), parameter))
    return list(distinct.values()), list(absent.values())


def _norms(grads: list[Tensor], absent: list[tuple[int, Tensor]]) -> GradientNorms:
    sharded = absent or any(is_sharded(grad) for grad in grads)
    if not grads and not sharded:
        return GradientNorms(torch.zeros(0), torch.tensor(0.0))
    here = _norms_here([local(grad) for grad in grads])
    return _over_the_ranks(grads, here.per_tensor, absent) if sharded else here


def _over_the_ranks(grads: list[Tensor], norms: Tensor, absent: list[tuple[int, Tensor]]) -> GradientNorms:
    """Norms of full tensors from those of their shards, in one reduction; replicas count once.

    All ranks bring a number for each DTensor, with a gradient or without, and one for all plain tensors.
    """
    places = [index for index, grad in enumerate(grads) if is_sharded(grad)]
    plain = [index for index, grad in enumerate(grads) if not is_sharded(grad)]
    squares = norms.square()
    nothing = squares.new_zeros(())
    slots: list[tuple[int, Tensor, Tensor]] = [(place, tensor, nothing) for place, tensor in absent]
    had = [False] * len(slots) + [True] * len(places)
    slots += [(place, grads[place], squares[place]) for place in places]
    order = sorted(range(len(slots)), key=lambda number: slots[number][0])  # stable: absent ones come first
    reduction = ShardReduction([None, *(slots[number][1] for number in order)])
    sums = reduction.sums(torch.stack([squares[plain].sum(), *(slots[number][2] for number in order)]))
    per_tensor = norms.clone()
    for number, total in zip(order, sums[1:].sqrt().unbind(), strict=True):
        if had[number]:
            per_tensor[slots[number][0]] = total
    return GradientNorms(per_tensor, sums.sum().sqrt())


def _norms_here(parts: list[Tensor]) -> GradientNorms:
    if not parts:
        return GradientNorms(torch.zeros(0, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    groups: dict[Any, list[int]] = {}
    for index, piece in enumerate(parts):
        groups.setdefault((piece.device, piece.dtype), []).append(index)
    norms: dict[int, Tensor] = {}
    for indices in groups.values():
        measured = _norm_of_each([parts[index] for index in indices])
        norms.update(zip(indices, measured.to(parts[0].device).unbind(), strict=True))
    per_tensor = torch.stack([norms[index] for index in range(len(parts))])
    return GradientNorms(per_tensor, _norm_of_each([per_tensor])[0])


def _norm_of_each(tensors: list[Tensor]) -> Tensor:
    """Norms [number of tensors] of tensors that share device and dtype."""
    device = tensors[0].device
    if device.type == "cpu":
        return torch.stack([_norm_on_host(tensor) for tensor in tensors])
    # On the device float64 costs little: reading the gradients takes longer than adding them up.
    precision = torch.float32 if device.type == "mps" else torch.float64
    norms = foreach_norm(tensors, 2, dtype=precision)
    return torch.stack(norms)


def _norm_on_host(tensor: Tensor) -> Tensor:
    narrow = torch.promote_types(tensor.dtype, torch.float32)
    if tensor.ndim >= 2 and _ROW[0] <= tensor.shape[-1] <= _ROW[1]:
        rows = torch.linalg.vector_norm(tensor, dim=-1, dtype=narrow)
        norm = torch.linalg.vector_norm(rows, dtype=torch.float64)
    elif tensor.numel() <= _ROW[1]:
        norm = torch.linalg.vector_norm(tensor, dtype=narrow).double()
    else:
        norm = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    lost = norm.item() < _TRUSTED or math.isinf(norm.item())
    return _norm_without_overflow(tensor) if lost and tensor.numel() else norm


def _norm_without_overflow(tensor: Tensor) -> Tensor:
    wide = tensor.double()
    largest = wide.abs().amax()
    if not 0 < largest < math.inf:
        return largest  # 0, inf and NaN are their own norms
    return torch.linalg.vector_norm(wide / largest) * largest


def _scale_(grads: list[Tensor], total: Tensor, max_norm: float) -> None:
    # A choice between tensors and not an `if`: on a GPU the host would have to wait for the total.
    coefficient = torch.where(total.isfinite(), (max_norm / (total + 1e-6)).clamp(max=1.0), 1.0)
    if coefficient.device.type == "cpu" and coefficient == 1:
        return
    groups: dict[Any, list[Tensor]] = {}
    for grad in grads:
        part = grad.to_local() if is_sharded(grad) else grad  # pyright: ignore[reportAttributeAccessIssue]
        groups.setdefault((part.device, part.dtype), []).append(part)
    for (device, dtype), members in groups.items():
        # Half precision multiplies in float32: the coefficient itself may be too small for float16.
        factor = coefficient.to(device, torch.promote_types(dtype, torch.float32))
        if dtype == factor.dtype:
            foreach_mul_(members, factor)
        else:
            for member in members:
                member.copy_(member.to(factor.dtype) * factor)
