"""Kernels for many tensors at once, fused steps, oneDNN's products; the loss scaler and clipping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from clinometer.torch_internals.look_up import look_up


def _one_by_one(name: str) -> Callable[..., None]:
    """`Tensor.<name>` of each tensor, with what belongs to it or with one thing for all."""

    def each(tensors: Sequence[Tensor], others: Any) -> None:
        many = others if isinstance(others, list | tuple) else [others] * len(tensors)
        for tensor, other in zip(tensors, many, strict=True):
            getattr(tensor, name)(other)

    return each


def _norm_of_each(tensors: Sequence[Tensor], order: float = 2, dtype: torch.dtype | None = None) -> Any:
    return [torch.linalg.vector_norm(tensor, order, dtype=dtype) for tensor in tensors]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _separated(whole: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = whole.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


foreach_add_: Any = look_up("_foreach_add_") or _one_by_one("add_")
foreach_copy_: Any = look_up("_foreach_copy_") or _one_by_one("copy_")
foreach_mul_: Any = look_up("_foreach_mul_") or _one_by_one("mul_")
foreach_sub_: Any = look_up("_foreach_sub_") or _one_by_one("sub_")
foreach_norm: Any = look_up("_foreach_norm") or _norm_of_each
fused_adamw_: Any = look_up("_fused_adamw_")
"""torch's fused AdamW; None if there is no such kernel."""
fused_sgd_: Any = look_up("_fused_sgd_")
"""torch's fused SGD; None if there is no such kernel."""
flatten: Callable[[Sequence[Tensor]], Tensor] = look_up("_utils._flatten_dense_tensors") or _joined
unflatten: Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]] = (
    look_up("_utils._unflatten_dense_tensors") or _separated
)
muon_init_group: Any = look_up("optim.Muon._init_group")
"""Fills the lists that a step of torch.optim.Muon works on; None if it has no such method."""
CLIPPING = "_clip_grads_with_norm_"
"""What clip_grad_norm_ calls, in its module, once the norm is known."""


def scale_of(scaler: Any) -> Tensor | None:
    """The loss scale on its device, without waiting for it; None before the first use."""
    return getattr(scaler, "_scale", None)


_linear: Any = look_up("ops.mkldnn._linear_pointwise")
_reorder: Any = look_up("ops.mkldnn._reorder_linear_weight")
_half: Any = look_up("ops.mkldnn._is_mkldnn_bf16_supported")
linear_onednn: Any = _linear
"""oneDNN's (x, weight, bias, what follows, its numbers, its algorithm) → x Wᵀ; None if there is no such."""
linear_blocked: Any = getattr(_linear, "default", None)
"""The same operator, looked up already: an operator's name costs as much as a small one's work."""
linear_blocked_binary: Any = getattr(_linear, "binary", None)
"""(x, other, weight, bias, what follows) → x Wᵀ and `other` put together."""


def has_blocked_products() -> bool:
    """Whether a weight can be copied into oneDNN's layout and multiplied there."""
    return linear_blocked is not None and linear_blocked_binary is not None and _reorder is not None


def to_blocked(weight: Tensor, rows: int) -> Tensor:
    """A weight in oneDNN's layout for inputs of this many rows."""
    return _reorder(weight, rows)


def onednn_multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for oneDNN's bfloat16 products."""
    return _half is not None and bool(_half())


def bfloat16_instructions() -> str:
    """The processor's instructions for bfloat16 products, by name; "" if it has none, or nobody knows."""
    for name, probe in (
        ("AMX", "cpu._is_amx_tile_supported"),
        ("AVX512-BF16", "cpu._is_avx512_bf16_supported"),
    ):
        if (supported := look_up(probe)) is not None and supported():
            return name
    return ""
