"""The block and the loss as a compiled training step on a CPU computes them.

The equations are those of `functional.py`, which is the file to read; here they have the order and the
kernels that were measured fastest (docs/log.md), and `tests/lm/test_fast.py` holds loss and every gradient to
the readable form. Only `torch.compile` comes through here: everything eager, gradient checks and diagnosis
among it, computes with `functional.py`. Shapes as there.

What differs, and what it gave on two cores of a Zen 4 at width 512, 4,096 tokens:
- float32 products by oneDNN where it outruns the library torch takes for them (`onednn_is_faster`);
- W_q, W_k, W_v in one product and W_1, W_3 in another: x is read once instead of three times and twice;
- half-precision attention over blocks of queries, each against the keys it may see (`attention_by_rows`);
- queries and keys keep a head's even entries before its odd ones, so that a rotation reads whole runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clinometer.lm import functional
from clinometer.lm.functional import BLOCK_WEIGHTS, Rotation
from clinometer.torch_internals.kernels import linear_onednn

LONGEST_BY_ROWS = 512
"""Attention by rows keeps S²/2 weights a head for its backward; beyond this many positions the kernel that
keeps none is used."""

_ROWS = 64

_library = torch.library.Library("clinometer", "DEF")
_library.define("linear_onednn(Tensor x, Tensor weight) -> Tensor")


def _linear_onednn(x: Tensor, weight: Tensor) -> Tensor:
    return linear_onednn(x, weight, None, "none", [], "")


_library.impl("linear_onednn", _linear_onednn, "CPU")


@torch.library.register_fake("clinometer::linear_onednn", lib=_library)
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class _LinearOneDnn(torch.autograd.Function):
    """y = x Wᵀ and dx = dy W by oneDNN; dW = dyᵀ x by torch, which is the faster one there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.clinometer.linear_onednn(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        x, weight = ctx.saved_tensors
        dx = torch.ops.clinometer.linear_onednn(dy, weight.t())
        return dx, dy.flatten(0, -2).t() @ x.flatten(0, -2)


def linear(x: Tensor, weight: Tensor, *, onednn: bool) -> Tensor:
    """y = x Wᵀ; `onednn` is for float32 on a CPU."""
    return _LinearOneDnn.apply(x, weight) if onednn else functional.linear(x, weight)  # pyright: ignore


def attention_by_rows(q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor) -> Tensor:
    """Causal `scaled_dot_product_attention`, block of queries by block of queries.

    A block sees the keys up to its own last position only, so that nearly half of the products fall away; the
    softmax is in float32 at least. (B, H, S, K).
    """
    S, K = q_BHSK.shape[-2:]
    blocks = []
    for first in range(0, S, _ROWS):
        last = min(first + _ROWS, S)
        scores = q_BHSK[..., first:last, :] @ k_BHSK[..., :last, :].transpose(-1, -2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * K**-0.5
        seen = torch.ones(last - first, last, dtype=torch.bool, device=scores.device).tril(first)
        p = functional.softmax(scores.masked_fill(~seen, -math.inf)).to(v_BHSK.dtype)
        blocks.append(p @ v_BHSK[..., :last, :])
    return torch.cat(blocks, dim=-2)


def even_entries_first(weight: Tensor, num_heads: int) -> Tensor:
    """W_q or W_k with the rows of each head in the order 0, 2, …, 1, 3, …: q·k stays the same sum."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def rotate_halves(x: Tensor, rotation: Rotation) -> Tensor:
    """`functional.rotate` for heads in that order: pair i is (entry i, entry i + K/2)."""
    cos, sin = rotation
    even, odd = x.chunk(2, dim=-1)
    return torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1).to(x.dtype)


def transformer_block(
    weights: Mapping[str, Tensor], x_BSD: Tensor, num_heads: int, rotation: Rotation, *, onednn: bool
) -> Tensor:
    """`functional.transformer_block` of whole sequences."""
    ln1, wq, wk, wv, wo, ln2, w1, w2, w3 = (weights[name] for name in BLOCK_WEIGHTS)
    D, F = x_BSD.shape[-1], w1.shape[0]

    wq, wk = even_entries_first(wq, num_heads), even_entries_first(wk, num_heads)
    qkv = linear(functional.rms_norm(x_BSD, ln1), torch.cat((wq, wk, wv)), onednn=onednn)
    q_BHSK, k_BHSK, v_BHSK = (
        y.unflatten(-1, (num_heads, -1)).transpose(-3, -2) for y in qkv.split(D, dim=-1)
    )
    q_BHSK, k_BHSK = rotate_halves(q_BHSK, rotation), rotate_halves(k_BHSK, rotation)
    half_precision = q_BHSK.dtype in (torch.bfloat16, torch.float16)
    if half_precision and q_BHSK.shape[-2] <= LONGEST_BY_ROWS:
        y_BHSK = attention_by_rows(q_BHSK, k_BHSK, v_BHSK)
    else:
        y_BHSK = functional.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, is_causal=True)
    x_BSD = x_BSD + linear(y_BHSK.transpose(-3, -2).flatten(-2), wo, onednn=onednn)

    gate, value = linear(functional.rms_norm(x_BSD, ln2), torch.cat((w1, w3)), onednn=onednn).split(F, dim=-1)
    return x_BSD + linear(functional.silu(gate) * value, w2, onednn=onednn)


def head_loss(x_BSD: Tensor, head_weight: Tensor, targets: Tensor, reduction: str, *, onednn: bool) -> Tensor:
    """From the final norm to the loss; where it runs eagerly after all (validation), as `functional` does."""
    logits = linear(x_BSD, head_weight, onednn=onednn and torch.compiler.is_compiling())
    return functional.cross_entropy(logits, targets, reduction=reduction)


def onednn_is_faster(size: int = 1024, rounds: int = 5) -> bool:
    """Whether oneDNN's float32 product outruns by a twentieth the library that torch takes for it here.

    On Intel's processors the two are alike; on AMD's, MKL is the slower one.
    """
    if not torch.backends.mkldnn.is_available() or linear_onednn is None:
        return False
    generator = torch.Generator().manual_seed(0)  # its own: a measurement moves no random number of the run
    x, weight = (torch.randn(size, size, generator=generator) for _ in range(2))
    best = {"onednn": math.inf, "torch": math.inf}
    with torch.no_grad():
        for _ in range(rounds):
            for name in best:
                start = time.perf_counter()
                _linear_onednn(x, weight) if name == "onednn" else functional.linear(x, weight)
                best[name] = min(best[name], time.perf_counter() - start)
    return best["onednn"] < 0.95 * best["torch"]
