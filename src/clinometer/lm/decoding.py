"""The next token of every row, from the keys and values of those before it: the model's fast form.

Shapes: N rows (batch), T positions with the new one, D model, H heads, K head, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clinometer.lm import functional
from clinometer.lm.model import Attention, FeedForward, TransformerBlock, TransformerLM, Weight
from clinometer.lm.products import pack
from clinometer.lm.transformer_config import RMS_NORM_EPS
from clinometer.torch_internals.modules import any_global_hook, has_forward_hooks, own_parameters
from clinometer.torch_internals.tensors import version_of

WORTH_PACKING = 32
"""Tokens still to make from which copying the weights pays: it costs what 7 to 26 tokens of
one row save (8 M and 162 M parameters)."""

KNOWN = {TransformerLM, TransformerBlock, Attention, FeedForward, Weight, nn.ModuleList}
DTYPES = {torch.float32, torch.float64, torch.bfloat16}


class OneMore(Protocol):
    """A layer's keys and values of earlier positions (see generate.py)."""

    def append_one(self, kv_N2HK: Tensor) -> tuple[Tensor, Tensor]:
        """Add one position's and return all so far, (N, H, T, K) each."""
        ...


class Cache(Protocol):
    @property
    def length(self) -> int: ...

    def __getitem__(self, index: int) -> OneMore: ...


class PackedBlock:
    """One block's weights in the layout of its products."""

    def __init__(self, block: TransformerBlock, rows: int, dtype: torch.dtype) -> None:
        attn, ffn = block.attn, block.ffn
        K = attn.q_proj.weight.shape[0] // block.num_heads
        q = attn.q_proj.weight.to(_wide(attn.q_proj.weight.dtype)) * K**-0.5
        qkv = torch.cat((q, attn.k_proj.weight, attn.v_proj.weight))
        self.qkv = pack(_after_norm(qkv, block.ln1.weight, dtype), rows)
        self.output = pack(attn.output_proj.weight.to(dtype), rows)
        self.w1 = pack(_after_norm(ffn.w1.weight, block.ln2.weight, dtype), rows)
        self.w3 = pack(_after_norm(ffn.w3.weight, block.ln2.weight, dtype), rows)
        self.w2 = pack(ffn.w2.weight.to(dtype), rows)


class Decoder:
    """One position through the model: `TransformerLM.forward` for S = 1 after a filled cache, up to rounding.

        x ← E[id];   for each layer, with u(x) = x / √(‖x‖² + D ε):
            q, k, v = R_t W_q' u(x), R_t W_k' u(x), W_v' u(x)       one product; R_t is position t's rotation
            x ← x + W_o [v₀ … v_t] softmax([k₀ … k_t]ᵀ q)
            x ← x + W₂ (silu(W₁' u(x)) ⊙ W₃' u(x))
        logits = W_head' u(x)

    A norm's weight w and √D are folded into the columns of the next product, W' = W diag(w) √D,
    and attention's 1/√K into W_q'. With products laid out for a few rows (products.py) that is the whole
    difference: fewer operations, each of which costs more than its arithmetic in a small model.

    The weights are copied once: about as many bytes as the model's own without its embedding, in `dtype`.
    """

    def __init__(
        self, model: TransformerLM, rows: int, dtype: torch.dtype, positions: int | None = None
    ) -> None:
        """For the first `positions` of a sequence; a config may name more than there is memory for."""
        config = model.config
        self.dtype = dtype
        self._embeddings = model.token_embeddings.weight
        # The residual stream, its norm and the rotation: float32 at least, whatever the products are in.
        self._wide = _wide(self._embeddings.dtype)
        self._layers = [PackedBlock(block, rows, dtype) for block in _blocks(model)]
        self._head = pack(_after_norm(model.lm_head.weight, model.ln_final.weight, dtype), rows)
        self._heads = (config.num_heads, config.head_dim)
        cos, sin = functional.rotary_table(
            torch.arange(config.context_length if positions is None else positions),
            config.head_dim,
            config.rope_theta,
            config.rope_scaling,
        )
        self._turns = torch.complex(cos.to(self._wide), sin.to(self._wide))
        self._floor = torch.tensor(math.sqrt(config.d_model * RMS_NORM_EPS), dtype=self._wide)

    def __call__(self, ids_N: Tensor, cache: Cache) -> Tensor:
        """Logits (N, V) after these ids at position `cache.length`; their keys and values join the cache."""
        N, (H, K) = ids_N.shape[0], self._heads
        turn = self._turns[cache.length]
        x_ND = F.embedding(ids_N, self._embeddings).to(self._wide)
        for i, layer in enumerate(self._layers):
            qkv_N3HK = layer.qkv(self._unit(x_ND)).to(self._wide).view(N, 3, H, K)
            torch.view_as_complex(qkv_N3HK[:, :2].view(N, 2, H, K // 2, 2)).mul_(turn)
            k_NHTK, v_NHTK = cache[i].append_one(qkv_N3HK[:, 1:])
            x_ND = layer.output.plus(self._attend(qkv_N3HK[:, 0], k_NHTK, v_NHTK), x_ND)
            u_ND = self._unit(x_ND)
            x_ND = layer.w2.plus(layer.w3.times(u_ND, layer.w1.silu(u_ND)), x_ND)
        return self._head(self._unit(x_ND))

    def _unit(self, x_ND: Tensor) -> Tensor:
        """x / √(‖x‖² + D ε)"""
        length_N1 = torch.linalg.vector_norm(x_ND, 2, -1, True)
        return (x_ND / torch.hypot(length_N1, self._floor)).to(self.dtype)

    def _attend(self, q_NHK: Tensor, k_NHTK: Tensor, v_NHTK: Tensor) -> Tensor:
        N, H, K = q_NHK.shape
        if self.dtype == torch.bfloat16:  # scores in float32, which only the fused kernel keeps
            q_NH1K = q_NHK.unsqueeze(2).to(self.dtype)
            return F.scaled_dot_product_attention(q_NH1K, k_NHTK, v_NHTK, scale=1.0).view(N, H * K)
        scores = torch.bmm(q_NHK.reshape(N * H, 1, K), k_NHTK.flatten(0, 1).transpose(1, 2))
        return torch.bmm(scores.softmax(-1), v_NHTK.flatten(0, 1)).view(N, H * K)


class Decoders:
    """The decoder of a model whose weights stay as they are, or none where the module itself must be called.

    None for another class than `TransformerLM` or for one with hooks, on another device than the CPU (not
    measured), for so few tokens that copying the weights does not pay, where memory is short, and from the
    moment in which weights were changed between two tokens.
    """

    def __init__(
        self, model: object, modules: Sequence[nn.Module], rows: int, positions: int | None = None
    ) -> None:
        self._model = model
        self._positions = positions
        self._modules = modules
        self._rows = rows
        self._decoder: Decoder | None = None
        self._seen: list[tuple[int, int]] = []
        self._given_up = not isinstance(model, TransformerLM)

    def now(self, tokens: int) -> Decoder | None:
        """The decoder for the next token, of which `tokens` are still to come."""
        if self._given_up or _instrumented(self._modules):
            return None
        if self._decoder is None and tokens < WORTH_PACKING:
            return None
        weights = [
            weight
            for module in self._modules
            for weight in own_parameters(module).values()
            if weight is not None
        ]
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weights[0].dtype
        if self._decoder is None:
            assert isinstance(self._model, TransformerLM)
            if dtype not in DTYPES or not _plain(weights) or not _room_for(weights):
                self._given_up = True
                return None
            with torch.autocast("cpu", enabled=False):
                self._decoder = Decoder(self._model, self._rows, dtype, self._positions)
            self._seen = [(id(weight), version_of(weight)) for weight in weights]
        elif dtype != self._decoder.dtype or self._seen != [
            (id(weight), version_of(weight)) for weight in weights
        ]:
            self._decoder, self._given_up = None, True
        return self._decoder


def _instrumented(modules: Sequence[nn.Module]) -> bool:
    """Whether calling a module does more than `functional` does: a hook, a subclass, a wrapped forward."""
    for module in modules:
        if has_forward_hooks(module) or "forward" in module.__dict__:
            return True
        if type(module) not in KNOWN:
            return True
    return any_global_hook()


def _plain(weights: Sequence[Tensor]) -> bool:
    """Whether all are ordinary parameters on the CPU, in one dtype, whose changes can be noticed."""
    return all(
        type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype == weights[0].dtype
        and not weight.is_inference()
        for weight in weights
    )


def _room_for(weights: Sequence[Tensor]) -> bool:
    """Whether memory for a second copy is at hand, as far as the system says."""
    try:
        told = Path("/proc/meminfo").read_text()
        available = int(told.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return True
    return 2 * sum(weight.nbytes for weight in weights) < available


def _blocks(model: TransformerLM) -> list[TransformerBlock]:
    return [block for block in model.layers if isinstance(block, TransformerBlock)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _after_norm(weight: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
    """W diag(w) √D: the weight as it acts on x / √(‖x‖² + D ε)."""
    wide = _wide(weight.dtype)
    return (weight.to(wide) * (norm.to(wide) * math.sqrt(norm.shape[0]))).to(dtype)
