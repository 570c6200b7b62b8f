"""The adapters of CS336's assignment 1 (basics), answered by Clinometer's functions.

Copy this file over the assignment's `tests/adapters.py` and run its tests: they then test Clinometer. Each
adapter only turns the assignment's arguments into ours; docs/en/cs336.md says what lies behind each.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from clinometer import AdamW, Tokenizer, TransformerConfig, clip_grad_norm_, cosine_schedule
from clinometer.lm import functional
from clinometer.text.byte_pairs import byte_pairs, from_byte_pairs
from clinometer.text.sampler import gather
from clinometer.text.tokenizer import train_bpe
from clinometer.training.checkpoints.checkpoint import load_checkpoint, save_checkpoint

File = str | os.PathLike | BinaryIO | IO[bytes]

# The model's parts: the sizes that the assignment passes along are those of the tensors.


def run_linear(d_in: int, d_out: int, weights: Tensor, in_features: Tensor) -> Tensor:
    return functional.linear(in_features, weights)


def run_embedding(vocab_size: int, d_model: int, weights: Tensor, token_ids: Tensor) -> Tensor:
    return functional.embedding(token_ids, weights)


def run_rmsnorm(d_model: int, eps: float, weights: Tensor, in_features: Tensor) -> Tensor:
    return functional.rms_norm(in_features, weights, eps)


def run_silu(in_features: Tensor) -> Tensor:
    return functional.silu(in_features)


def run_swiglu(
    d_model: int, d_ff: int, w1_weight: Tensor, w2_weight: Tensor, w3_weight: Tensor, in_features: Tensor
) -> Tensor:
    return functional.swiglu(in_features, w1_weight, w2_weight, w3_weight)


def run_softmax(in_features: Tensor, dim: int) -> Tensor:
    return functional.softmax(in_features, dim)


def run_rope(
    d_k: int, theta: float, max_seq_len: int, in_query_or_key: Tensor, token_positions: Tensor
) -> Tensor:
    return functional.rope(in_query_or_key, token_positions, theta)


def run_scaled_dot_product_attention(Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None) -> Tensor:
    return functional.scaled_dot_product_attention(Q, K, V, mask)


def run_multihead_self_attention(
    d_model: int,
    num_heads: int,
    q_proj_weight: Tensor,
    k_proj_weight: Tensor,
    v_proj_weight: Tensor,
    o_proj_weight: Tensor,
    in_features: Tensor,
) -> Tensor:
    weights = q_proj_weight, k_proj_weight, v_proj_weight, o_proj_weight
    return functional.multihead_attention(in_features, *weights, num_heads)


def run_multihead_self_attention_with_rope(
    d_model: int,
    num_heads: int,
    max_seq_len: int,
    theta: float,
    q_proj_weight: Tensor,
    k_proj_weight: Tensor,
    v_proj_weight: Tensor,
    o_proj_weight: Tensor,
    in_features: Tensor,
    token_positions: Tensor | None = None,
) -> Tensor:
    weights = q_proj_weight, k_proj_weight, v_proj_weight, o_proj_weight
    if token_positions is None:
        token_positions = torch.arange(in_features.shape[-2], device=in_features.device)
    # (..., S) to (..., 1, S): the heads of a sequence share its positions.
    positions = token_positions.unsqueeze(-2) if token_positions.ndim > 1 else token_positions
    rotation = functional.rotary_table(positions, d_model // num_heads, theta)
    return functional.multihead_attention(in_features, *weights, num_heads, rotation=rotation)


def run_transformer_block(
    d_model: int,
    num_heads: int,
    d_ff: int,
    max_seq_len: int,
    theta: float,
    weights: dict[str, Tensor],
    in_features: Tensor,
) -> Tensor:
    positions = torch.arange(in_features.shape[-2], device=in_features.device)
    rotation = functional.rotary_table(positions, d_model // num_heads, theta)
    return functional.transformer_block(weights, in_features, num_heads, rotation=rotation)


def run_transformer_lm(
    vocab_size: int,
    context_length: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    d_ff: int,
    rope_theta: float,
    weights: dict[str, Tensor],
    in_indices: Tensor,
) -> Tensor:
    config = TransformerConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        d_ff=d_ff,
        rope_theta=rope_theta,
    )
    return functional.transformer_lm(weights, in_indices, config)


# The loss, the optimizer and its schedule.


def run_cross_entropy(inputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(inputs, targets)


def run_gradient_clipping(parameters: Iterable[torch.nn.Parameter], max_l2_norm: float) -> None:
    clip_grad_norm_(parameters, max_l2_norm)


def get_adamw_cls() -> type[torch.optim.Optimizer]:
    return AdamW


def run_get_lr_cosine_schedule(
    it: int, max_learning_rate: float, min_learning_rate: float, warmup_iters: int, cosine_cycle_iters: int
) -> float:
    return cosine_schedule(it, max_learning_rate, min_learning_rate, warmup_iters, cosine_cycle_iters)


# Data and checkpoints.


def run_get_batch(
    dataset: np.ndarray, batch_size: int, context_length: int, device: str
) -> tuple[Tensor, Tensor]:
    # Any start, drawn anew for each call. `clinometer train` visits every window once an epoch instead
    # (text.sampler.batch), as a function of the step alone.
    starts = torch.randint(len(dataset) - context_length, (batch_size,)).numpy()
    token_ids, targets = gather(dataset, starts, context_length)
    return torch.from_numpy(token_ids).to(device), torch.from_numpy(targets).to(device)


def run_save_checkpoint(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, iteration: int, out: File
) -> None:
    # Ours is a folder of safetensors and JSON; the assignment wants one file, or something open for writing.
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(out, "w") as archive:
        for file in save_checkpoint(Path(folder), iteration, model, [optimizer], {}).iterdir():
            archive.write(file, file.name)


def run_load_checkpoint(src: File, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(src) as archive:
        archive.extractall(folder)
        return load_checkpoint(Path(folder), model, [optimizer])["step"]


# Text.


def get_tokenizer(
    vocab: dict[int, bytes], merges: list[tuple[bytes, bytes]], special_tokens: list[str] | None = None
) -> Tokenizer:
    return from_byte_pairs(vocab, merges, special_tokens or ())


def run_train_bpe(
    input_path: str | os.PathLike, vocab_size: int, special_tokens: list[str], **kwargs: Any
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    # Of two pairs that occur equally often, ours merges the one with the lower ids first and the assignment
    # the one with the greater bytes: from the first tie on, the two tokenizers differ.
    text = Path(input_path).read_text(encoding="utf-8")
    return byte_pairs(train_bpe([text], vocab_size, special_tokens=special_tokens))
