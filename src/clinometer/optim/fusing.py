"""Which gradients an optimizer takes, and which parameters may share one call of torch's fused kernels."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from clinometer.messages import InputError

_DEVICES = ("cpu", "cuda")
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


def shared_kernel(parameter: Tensor, *others: Tensor) -> Hashable | None:
    """What parameters must have in common to share a fused call; None: no fused kernel takes this one.

    The kernels walk raw memory: with unequal strides (a hand-made gradient of a transposed weight) they pair
    the wrong elements without an error, so such parameters are left to the reference.
    """
    if parameter.device.type not in _DEVICES or parameter.dtype not in _DTYPES:
        return None
    for other in others:
        if other.stride() != parameter.stride() or other.dtype != parameter.dtype:
            return None
        if other.device != parameter.device:
            return None
    # A call takes the DTensors of one mesh, or plain tensors.
    return parameter.device, parameter.dtype, getattr(parameter, "device_mesh", None)


def widened(tensor: Tensor) -> Tensor:
    """`tensor` in the precision that updates are computed in: float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
