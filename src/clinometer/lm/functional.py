"""The Transformer language model as pure functions of a weights mapping.

Read from the bottom up: `transformer_lm` is the model; everything above it is a part. Shapes stand in
the names of the variables:

    B batch   S sequence (queries)   T sequence (keys, values)   D model   H heads   K head   F feed-forward
    V vocabulary

Each function computes its docstring's equation with the kernel that does it fastest (torch fuses the
normalisation and the attention), and casts what the equation needs in float32 under autocast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clinometer.lm.transformer_config import RMS_NORM_EPS, TransformerConfig
from clinometer.messages import InputError

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary angles, each (..., S, K/2)."""

_HALF = (torch.bfloat16, torch.float16)

BLOCK_WEIGHTS = (
    "ln1.weight",
    "attn.q_proj.weight",
    "attn.k_proj.weight",
    "attn.v_proj.weight",
    "attn.output_proj.weight",
    "ln2.weight",
    "ffn.w1.weight",
    "ffn.w2.weight",
    "ffn.w3.weight",
)


@runtime_checkable
class LayerCache(Protocol):
    """Keys and values of earlier positions, kept by the caller between calls (see generate.py)."""

    def append(self, k_BHSK: Tensor, v_BHSK: Tensor) -> tuple[Tensor, Tensor]:
        """Add these and return all so far, (B, H, T, K) each."""
        ...


def linear(x: Float[Tensor, "*batch i"], weight: Float[Tensor, "o i"]) -> Float[Tensor, "*batch o"]:
    """y = x Wᵀ."""
    return F.linear(x, weight)


def embedding(token_ids: Int[Tensor, "*batch"], weight: Float[Tensor, "V D"]) -> Float[Tensor, "*batch D"]:
    """Row `token_ids` of the table. Raises `InputError` for an id outside 0 … V-1 (checked on the CPU,
    where it costs nothing; a GPU asserts by itself)."""
    if not torch.compiler.is_compiling() and token_ids.device.type == "cpu" and token_ids.numel():
        low, high = (int(bound) for bound in torch.aminmax(token_ids))
        if low < 0 or high >= weight.shape[0]:
            raise _out_of_range("model.id_range", token_ids, weight.shape[0])
    return F.embedding(token_ids, weight)


def rms_norm(
    x: Float[Tensor, "*batch D"], weight: Float[Tensor, " D"], eps: float = RMS_NORM_EPS
) -> Float[Tensor, "*batch D"]:
    """y = w ⊙ x / √(mean(x²) + ε), the mean over D. Source: Zhang & Sennrich 2019."""
    return F.rms_norm(x, weight.shape, weight, eps)


def silu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x · σ(x). Source: Elfwing et al. 2017."""
    return F.silu(x)


def swiglu(
    x: Float[Tensor, "*batch D"],
    w1: Float[Tensor, "F D"],
    w2: Float[Tensor, "D F"],
    w3: Float[Tensor, "F D"],
) -> Float[Tensor, "*batch D"]:
    """W₂ (silu(W₁ x) ⊙ W₃ x). Source: Shazeer 2020, "GLU variants improve Transformer"."""
    return linear(silu(linear(x, w1)) * linear(x, w3), w2)


def rotary_table(
    positions: Int[Tensor, "*batch S"],
    head_dim: int,
    theta: float,
    scaling: Sequence[float] | None = None,
) -> Rotation:
    """cos and sin of the angles m·f_i, f_i = θ^(-2i/K), at positions m, for the pairs i = 0 … K/2-1.

    Both are (..., S, K/2).
    `scaling` = (c, l, h, S₀) stretches what turns less than l times in the S₀ positions of the model's first
    training by c, and leaves what turns more than h times (Llama 3.1):

        f_i ← f_i (r + (1-r)/c) ,   r = (S₀ f_i/2π - l)/(h - l) kept within 0 … 1

    In float32 whatever the model's dtype, as transformers does: a trained model's angles are part of it.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is not None:
        factor, low, high, original = scaling
        kept = ((original * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / factor
    angles = positions.to(torch.float32)[..., None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "*batch S K"], rotation: Rotation) -> Float[Tensor, "*batch S K"]:
    """(x₂ᵢ, x₂ᵢ₊₁) ← (x₂ᵢ cos - x₂ᵢ₊₁ sin, x₂ᵢ sin + x₂ᵢ₊₁ cos): each pair turned by its angle."""
    cos, sin = rotation
    even, odd = x[..., 0::2], x[..., 1::2]
    # The float32 tables lift half-precision x to float32 for the two products; only the result is rounded.
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def rope(
    x: Float[Tensor, "*batch S K"], positions: Int[Tensor, "*positions S"], theta: float = 10_000.0
) -> Float[Tensor, "*batch S K"]:
    """Rotary position embedding on interleaved pairs, at any positions. Source: Su et al. 2021.

    `positions` is (S,), or has as many leading dimensions as should differ (it broadcasts against x's).
    """
    return rotate(x, rotary_table(positions, x.shape[-1], theta))


def softmax(x: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
    """exp(x - max x) / Σ exp(x - max x) along `dim`: subtracting the maximum keeps exp in range."""
    return torch.softmax(x, dim)


def scaled_dot_product_attention(
    q: Float[Tensor, "*batch S K"],
    k: Float[Tensor, "*batch T K"],
    v: Float[Tensor, "*batch T J"],
    mask: Bool[Tensor, "... S T"] | None = None,
    *,
    is_causal: bool = False,
) -> Float[Tensor, "*batch S J"]:
    """softmax(q kᵀ / √K) v, over the keys where `mask` is true. Source: Vaswani et al. 2017 §3.2.1.

    `is_causal` is the mask "key position ≤ query position" without a tensor; give one or the other. A
    query that may see no key gets zeros. On the CPU half precision is computed in float32.
    """
    if q.device.type == "cpu" and q.dtype in _HALF and not torch.compiler.is_compiling():
        # torch's kernel is slow for half precision: its backward took 4.2 ms where float32 takes 0.9.
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), attn_mask=mask, is_causal=is_causal
            )
        return y.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


def multihead_attention(
    x_BSD: Float[Tensor, "*batch S D"],
    q_weight: Float[Tensor, "D D"],
    k_weight: Float[Tensor, "D D"],
    v_weight: Float[Tensor, "D D"],
    output_weight: Float[Tensor, "D D"],
    num_heads: int,
    *,
    rotation: Rotation | None = None,
    cache: LayerCache | None = None,
) -> Float[Tensor, "*batch S D"]:
    """Causal self-attention: H heads of width K = D/H attend side by side, and W_o mixes them.

        W_o · concat_h softmax(q_h k_hᵀ / √K) v_h ,   q = W_q x, k = W_k x, v = W_v x

    With `rotation`, queries and keys are turned by their positions (RoPE); without, there is no notion of
    position but the mask's. With `cache`, x are the positions after those the cache holds.
    """

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (num_heads, -1)).transpose(-3, -2)

    q_BHSK, k_BHSK, v_BHSK = (heads(linear(x_BSD, w)) for w in (q_weight, k_weight, v_weight))
    if rotation is not None:
        q_BHSK, k_BHSK = rotate(q_BHSK, rotation), rotate(k_BHSK, rotation)
    k_BHTK, v_BHTK = (k_BHSK, v_BHSK) if cache is None else cache.append(k_BHSK, v_BHSK)

    S, T = q_BHSK.shape[-2], k_BHTK.shape[-2]
    mask_ST = None
    if 1 < S < T:  # the last S of T positions: square causality (is_causal) would not line up
        mask_ST = torch.ones(S, T, dtype=torch.bool, device=x_BSD.device).tril(T - S)
    y_BHSK = scaled_dot_product_attention(q_BHSK, k_BHTK, v_BHTK, mask_ST, is_causal=S == T)
    return linear(y_BHSK.transpose(-3, -2).flatten(-2), output_weight)


def transformer_block(
    weights: Mapping[str, Tensor],
    x_BSD: Float[Tensor, "*batch S D"],
    num_heads: int,
    *,
    rotation: Rotation | None = None,
    cache: LayerCache | None = None,
) -> Float[Tensor, "*batch S D"]:
    """A pre-norm block: x ← x + attention(norm₁ x);  x ← x + swiglu(norm₂ x). Source: Xiong et al. 2020.

    `weights` has the names of `BLOCK_WEIGHTS`, without the layer's prefix.
    """
    ln1, wq, wk, wv, wo, ln2, w1, w2, w3 = (weights[name] for name in BLOCK_WEIGHTS)
    x_BSD = x_BSD + multihead_attention(
        rms_norm(x_BSD, ln1), wq, wk, wv, wo, num_heads, rotation=rotation, cache=cache
    )
    return x_BSD + swiglu(rms_norm(x_BSD, ln2), w1, w2, w3)


def transformer_lm(
    weights: Mapping[str, Tensor],
    token_ids: Int[Tensor, "*batch S"],
    config: TransformerConfig,
) -> Float[Tensor, "*batch S V"]:
    """Logits of the next token at every position: embed, L blocks, final norm, project onto the vocabulary.

    Pure: works on any mapping of tensors with the names of `config.weight_shapes()`; they may be leaves
    that require grad. Raises `InputError` for a missing or misshapen weight, an id outside the vocabulary
    and a sequence longer than context_length.
    """
    check_weights(weights, config)
    check_length(token_ids.shape[-1], config)
    positions = torch.arange(token_ids.shape[-1], device=token_ids.device)
    rotation = rotary_table(positions, config.head_dim, config.rope_theta, config.rope_scaling)

    x_BSD = embedding(token_ids, weights["token_embeddings.weight"])
    for i in range(config.num_layers):
        block = {name: weights[f"layers.{i}.{name}"] for name in BLOCK_WEIGHTS}
        x_BSD = transformer_block(block, x_BSD, config.num_heads, rotation=rotation)
    x_BSD = rms_norm(x_BSD, weights["ln_final.weight"])
    return linear(x_BSD, weights["lm_head.weight"])


def cross_entropy(
    logits: Float[Tensor, "*batch V"],
    targets: Int[Tensor, "*batch"],
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Float[Tensor, "*reduced"]:
    """Mean over positions of -log softmax(logits)[target] = logsumexp(logits) - logits[target], in nats.

    Positions whose target is `ignore_index` do not count; if none counts the mean is NaN, as 0/0 is.
    `reduction` is "mean", "sum" or "none". In float32 at least; the maximum is subtracted first, so
    logits × 1000 are as safe as logits. Raises `InputError` for a target outside 0 … V-1.
    """
    V = logits.shape[-1]
    check_targets(targets, V, ignore_index)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    loss = F.cross_entropy(
        logits.reshape(-1, V), targets.reshape(-1).long(), ignore_index=ignore_index, reduction=reduction
    )
    return loss.view(targets.shape) if reduction == "none" else loss


def linear_cross_entropy(
    x_BSD: Float[Tensor, "*batch D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "*batch"],
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Float[Tensor, ""]:
    """`cross_entropy(linear(x, weight), targets)` without ever holding all the logits.

    Worth it for a large vocabulary: B·S·V logits and their gradient are the largest tensors of training.
    No double backward and no forward mode: use the plain form for gradient checks.
    """
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch before 2.13
        return cross_entropy(linear(x_BSD, weight), targets, ignore_index=ignore_index, reduction=reduction)
    check_targets(targets, weight.shape[0], ignore_index)
    return F.linear_cross_entropy(
        x_BSD.reshape(-1, x_BSD.shape[-1]),
        weight,
        targets.reshape(-1).long(),
        ignore_index=ignore_index,
        reduction=reduction,
        options=torch.nn.LinearCrossEntropyOptions(),
    )


def check_length(length: int, config: TransformerConfig) -> None:
    """Raise `InputError` if a sequence is longer than the model's context."""
    if length > config.context_length:
        raise InputError("model.too_long", length=length, context_length=config.context_length)


def check_weights(weights: Mapping[str, Tensor], config: TransformerConfig) -> None:
    shapes = config.weight_shapes()
    missing = [name for name in shapes if name not in weights]
    if missing:
        more = f" (+{len(missing) - 1})" if len(missing) > 1 else ""
        raise InputError("model.weights_missing", name=missing[0], count=more, layers=config.num_layers)
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise InputError(
                "model.weight_shape", name=name, shape=tuple(weights[name].shape), expected=shape
            )


def check_targets(targets: Tensor, size: int, ignore_index: int = -100) -> None:
    """Raise `InputError` for a target outside 0 … size-1 (on the CPU; a GPU asserts by itself)."""
    if torch.compiler.is_compiling() or targets.device.type != "cpu":
        return
    wrong = ((targets < 0) | (targets >= size)) & (targets != ignore_index)
    if bool(wrong.any()):
        raise _out_of_range("model.target_range", targets, size, ignore_index=ignore_index)


def _out_of_range(key: str, ids: Tensor, size: int, **more: int) -> InputError:
    wrong = (ids < 0) | (ids >= size)
    if "ignore_index" in more:
        wrong &= ids != more["ignore_index"]
    index = tuple(wrong.nonzero()[0].tolist())
    return InputError(key, value=int(ids[index]), vocab_size=size, last=size - 1, index=list(index), **more)
