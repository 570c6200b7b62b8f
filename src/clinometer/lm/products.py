"""Products of a few rows with weights that stay as they are for many calls.

A token's products read every weight once and do little with it, so the layout in memory decides: oneDNN's
blocked one (Inductor's, for frozen weights) takes 0.2 to 0.7 of the plain one's time for 1 to 32 rows
(AMD EPYC, one and two threads), and what follows a product (sum, gate, SiLU) is done before it is written.
Elsewhere, and in dtypes that oneDNN does not take, the same products without it.
"""

from __future__ import annotations

import platform
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clinometer.torch_internals.kernels import (
    has_blocked_products,
    linear_blocked,
    linear_blocked_binary,
    onednn_multiplies_bfloat16,
    to_blocked,
)

SMALL = 2**18
"""Bytes of a weight below which oneDNN's 15 µs a call are more than it saves."""

ROWS = 32
"""The rows for which the layout is chosen."""


class Product(Protocol):
    """y = x Wᵀ for x (N, in) and W (out, in), and what usually follows it, in one call each."""

    def __call__(self, x: Tensor) -> Tensor:
        """x Wᵀ"""
        ...

    def silu(self, x: Tensor) -> Tensor:
        """silu(x Wᵀ)"""
        ...

    def times(self, x: Tensor, gate: Tensor) -> Tensor:
        """gate ⊙ x Wᵀ"""
        ...

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + x Wᵀ"""
        ...


class PlainProduct:
    """The product with the weight as it is, or, `turned`, with its transpose copied."""

    def __init__(self, weight: Tensor, *, turned: bool = False) -> None:
        self._turned = weight.t().contiguous() if turned else weight.t()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.mm(x, self._turned)

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(torch.mm(x, self._turned), inplace=True)

    def times(self, x: Tensor, gate: Tensor) -> Tensor:
        return torch.mm(x, self._turned).mul_(gate)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        if residual.dtype != x.dtype:  # a float32 residual of bfloat16 products
            return residual + torch.mm(x, self._turned)
        return torch.addmm(residual, x, self._turned)


class BlockedProduct:
    """The product with the weight copied into oneDNN's layout."""

    def __init__(self, weight: Tensor) -> None:
        self._blocked = to_blocked(weight, ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        return linear_blocked(x, self._blocked, None, "none", [], "")

    def silu(self, x: Tensor) -> Tensor:
        return linear_blocked(x, self._blocked, None, "swish", [], "")

    def times(self, x: Tensor, gate: Tensor) -> Tensor:
        return linear_blocked_binary(x, gate, self._blocked, None, "mul")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        if residual.dtype != x.dtype:  # a float32 residual of bfloat16 products
            return residual + self(x)
        return linear_blocked_binary(x, residual, self._blocked, None, "add")


def blocks(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN multiplies this dtype well: float32 and, where the processor has
    instructions for it, bfloat16, on x86."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.mkldnn.enabled or not has_blocked_products():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and onednn_multiplies_bfloat16())


def pack(weight: Tensor, rows: int) -> Product:
    """The fastest product of this many rows with this weight, (out, in), that the machine has."""
    if weight.nbytes < SMALL or not blocks(weight.dtype):
        return PlainProduct(weight)
    if rows == 1 and weight.dtype == torch.float32:
        return PlainProduct(weight, turned=weight.shape[0] > weight.shape[1])
    return BlockedProduct(weight)
