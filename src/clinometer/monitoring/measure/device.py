"""The same statistics for tensors on a GPU: a few kernels for all tensors, without waiting.

The results are read a step later: the caller copies them without blocking.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clinometer.distributed.sharded_tensors import local
from clinometer.torch_internals.kernels import foreach_copy_, foreach_norm, foreach_sub_

_LOST = 1e-15
"""Below this norm the squares of a float32 dot product may have vanished: no cosine is given."""


def gradients_on_device(grads: list[Tensor], moments: list[Tensor | None]) -> Tensor:
    """[number of gradients, 6]: norm, largest, share of zeros, non-finite count, cosine with the moment, and
    the moment's norm; all tensors are on one device. Without a moment the last two are NaN."""
    precision = _precision(grads[0])
    nothing = torch.full((), float("nan"), dtype=precision, device=grads[0].device)
    dense = [grad.detach() if grad.layout is torch.strided else grad.detach().to_dense() for grad in grads]
    moduli = [grad.abs() if grad.is_complex() else grad for grad in dense]
    rows = [_row(grad) for grad in dense]
    norms = _norms(rows, precision)
    largest = [m.abs().max().to(precision) if m.numel() else nothing.new_zeros(()) for m in moduli]
    zeros = [1 - torch.count_nonzero(m).to(precision) / max(m.numel(), 1) for m in moduli]
    zeros = [z if m.numel() else nothing.new_zeros(()) for z, m in zip(zeros, moduli, strict=True)]
    nonfinite = [(m.numel() - torch.isfinite(m).sum()).to(precision) for m in moduli]
    cosines, moment_norms = [nothing] * len(grads), [nothing] * len(grads)
    known = {i: _row(m) for i, m in enumerate(moments) if m is not None and m.shape == grads[i].shape}
    for (index, moment), norm in zip(known.items(), _norms(list(known.values()), precision), strict=True):
        product = torch.dot(_wide(rows[index]), _wide(moment)).to(precision)
        cosine = (product / norms[index] / norm).clamp(-1, 1)
        defined = (norms[index] > _LOST) & (norm > _LOST) & norms[index].isfinite()
        cosines[index] = torch.where(defined, cosine, nothing)
        moment_norms[index] = norm
    bad = torch.stack(nonfinite) > 0
    infinite = torch.full_like(torch.stack(norms), float("inf"))
    return torch.stack(
        [
            torch.where(bad, infinite, torch.stack(norms)),
            torch.where(bad, infinite, torch.stack(largest)),
            torch.stack(zeros),
            torch.stack(nonfinite),
            torch.stack(cosines),
            torch.stack(moment_norms),
        ],
        dim=1,
    )


def weights_on_device(weights: list[Tensor], before: list[Tensor]) -> Tensor:
    """[number of weights, 2]: ‖θ‖ and ‖θ − before‖; `before` (flat) is θ afterwards."""
    precision = _precision(weights[0])
    rows = [_row(local(weight)) for weight in weights]
    norms = _norms(rows, precision)
    if all(old.dtype in (torch.float32, torch.float64) for old in before):
        foreach_sub_(before, rows)
        moved = _norms(before, precision)
    else:
        moved = _norms([_wide(old) - _wide(new) for old, new in zip(before, rows, strict=True)], precision)
    foreach_copy_(before, rows)
    return torch.stack([torch.stack(norms), torch.stack(moved)], dim=1)


def _norms(tensors: list[Tensor], precision: torch.dtype) -> list[Tensor]:
    """Norms in `precision`; NaN becomes +inf."""
    if not tensors:
        return []
    groups: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(tensor.dtype, []).append(index)
    found: dict[int, Tensor] = {}
    for indices in groups.values():
        norms = foreach_norm([tensors[i] for i in indices], 2, dtype=precision)
        found.update(zip(indices, norms, strict=True))
    return [found[i].nan_to_num(nan=float("inf"), posinf=float("inf")) for i in range(len(tensors))]


def _row(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.reshape(-1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _precision(tensor: Tensor) -> torch.dtype:
    # On a GPU float64 costs little here: reading takes longer than adding up. MPS has none.
    return torch.float32 if tensor.device.type == "mps" else torch.float64
