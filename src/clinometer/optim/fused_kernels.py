"""Which gradients an optimizer takes, and which parameters may share one call of torch's fused kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from clinometer.distributed.sharded_tensors import is_sharded, local
from clinometer.messages import InputError
from clinometer.torch_internals.kernels import flatten, foreach_copy_, unflatten

_DEVICES = ("cpu", "cuda")
_SMALL = 16384
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def with_grad(group: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """The (parameter, gradient) pairs of one optimizer group, in order, without those whose gradient is None.

    Raises `InputError` on a sparse or complex gradient.
    """
    names = group.get("param_names")
    found = []
    for index, parameter in enumerate(group["params"]):
        grad = parameter.grad
        if grad is not None:
            refuse_unusual(grad, names[index] if names else f"params[{index}]")
            found.append((parameter, grad))
    return found


def refuse_unusual(grad: Tensor, name: str) -> None:
    """Raise `InputError` on a gradient that is sparse or complex."""
    if grad.layout != torch.strided:
        raise InputError("optim.sparse", name=name, layout=str(grad.layout))
    if grad.is_complex():
        raise InputError("optim.complex", name=name, dtype=str(grad.dtype))


def local_parts(parameter: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """This rank's part of a DTensor and of what belongs to it; other tensors as they are.

    An update that goes entry by entry is the whole tensor's update, done where each entry is: no collective,
    but for a gradient that is spread in another way, which is spread anew (every rank calls).
    """
    if not is_sharded(parameter):
        return (parameter, *others)
    whole: Any = parameter
    mesh, placements = whole.device_mesh, whole.placements
    parts = [local(parameter)]
    for number, other in enumerate(others):
        spread: Any = other
        if not is_sharded(other) or spread.placements != placements or spread.device_mesh != mesh:
            if number or not is_sharded(other):  # a state, which is written: it cannot be a copy
                return (parameter, *others)
            spread = spread.redistribute(mesh, placements)
        parts.append(local(spread))
    return tuple(parts)


def shared_kernel(parameter: Tensor, *others: Tensor) -> Hashable | None:
    """What parameters must have in common to share a fused call; None: no fused kernel takes this one.

    The kernels walk raw memory: with unequal strides (a hand-made gradient of a transposed weight) they pair
    the wrong elements without an error, so such parameters are left to the reference.
    """
    device, dtype, contiguous = parameter.device, parameter.dtype, parameter.is_contiguous()
    if device.type not in _DEVICES or dtype not in _DTYPES:
        return None
    for other in others:
        if other.dtype is not dtype or other.device != device:
            return None
        if not (contiguous and other.is_contiguous()) and other.stride() != parameter.stride():
            return None
    # A call takes the DTensors of one mesh, or plain tensors.
    return device, dtype, _mesh(parameter)


def _mesh(tensor: Any) -> Hashable | None:
    return tensor.device_mesh if is_sharded(tensor) else None


def with_small_joined(update: Callable[..., None], columns: list[list[Tensor]]) -> None:
    """Call `update(thetas, grads, *states)`, a fused kernel, with the small tensors of each column joined.

    On the CPU the kernel starts its threads anew for every tensor, 64 weights or 64 million. Where the cores
    are shared, each start can wait a time slice: 50 vectors took 266 ms, joined and copied back 1 ms.
    """
    first = columns[0][0]
    sizes = [tensor.numel() for tensor in columns[0]]
    small = [index for index, size in enumerate(sizes) if size <= _SMALL]
    if first.device.type != "cpu" or len(small) < 2 or is_sharded(first):
        update(*columns)
        return
    large = [index for index, size in enumerate(sizes) if size > _SMALL]
    scattered = [[column[index] for index in small] for column in columns]
    joined = [flatten(tensors) for tensors in scattered]
    update(*([*(column[i] for i in large), whole] for column, whole in zip(columns, joined, strict=True)))
    del scattered[1], joined[1]  # the gradients are only read
    for tensors, whole in zip(scattered, joined, strict=True):
        pieces = unflatten(whole, tensors)
        foreach_copy_(tensors, pieces)


def widened(tensor: Tensor) -> Tensor:
    """`tensor` in the precision that updates are computed in: float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
