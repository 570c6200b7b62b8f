"""The shape of a Transformer language model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clinometer.messages import InputError

RMS_NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The sizes that fix a Transformer language model.

    Parameters (linear weights are (out, in), no biases, the head is not tied to the embedding):

        2·V·D + L·(4·D² + 3·D·F + 2·D) + D

    Raises `InputError` for a size that is not a whole number above zero, heads that do not divide
    d_model, an odd head size (RoPE rotates pairs), a rope_theta that is not finite and positive, a
    rope_scaling that is no stretching.
    """

    vocab_size: int
    """V: token ids are 0 … V-1."""
    context_length: int
    """The longest sequence the model is trained on and accepts."""
    d_model: int
    """D: width of the residual stream."""
    num_layers: int
    """L: number of Transformer blocks."""
    num_heads: int
    """H: attention heads; each is D/H wide."""
    d_ff: int
    """F: width inside the feed-forward layer; 8/3·D keeps its size that of a plain 4·D one (Shazeer 2020)."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths: pair i turns by position · theta^(-2i/K) radians."""
    rope_scaling: tuple[float, float, float, float] | None = None
    """Llama 3.1's stretching of long wavelengths, for a context longer than the model first had: (factor,
    low_freq_factor, high_freq_factor, original_context); see `functional.rotary_table`."""

    def __post_init__(self) -> None:
        for field in ("vocab_size", "context_length", "d_model", "num_layers", "num_heads", "d_ff"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError("model.positive", field=field, value=value)
        if self.d_model % self.num_heads:
            near = max(1, round(self.d_model / (2 * self.num_heads))) * 2 * self.num_heads
            raise InputError("model.heads", d_model=self.d_model, num_heads=self.num_heads, suggestion=near)
        if self.head_dim % 2:
            raise InputError(
                "model.odd_head",
                d_model=self.d_model,
                num_heads=self.num_heads,
                head_dim=self.head_dim,
                suggestion=(self.head_dim + 1) * self.num_heads,
            )
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 0):
            raise InputError("model.theta", value=self.rope_theta)
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", tuple(self.rope_scaling))  # JSON and TOML have lists
            if not _stretches(self.rope_scaling):
                raise InputError("model.scaling", value=list(self.rope_scaling))

    @property
    def head_dim(self) -> int:
        """K: width of one attention head, D/H."""
        return self.d_model // self.num_heads

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight's name and shape, in the order data flows through them."""
        V, D, F = self.vocab_size, self.d_model, self.d_ff
        shapes: dict[str, tuple[int, ...]] = {"token_embeddings.weight": (V, D)}
        for i in range(self.num_layers):
            shapes |= {
                f"layers.{i}.ln1.weight": (D,),
                f"layers.{i}.attn.q_proj.weight": (D, D),
                f"layers.{i}.attn.k_proj.weight": (D, D),
                f"layers.{i}.attn.v_proj.weight": (D, D),
                f"layers.{i}.attn.output_proj.weight": (D, D),
                f"layers.{i}.ln2.weight": (D,),
                f"layers.{i}.ffn.w1.weight": (F, D),
                f"layers.{i}.ffn.w2.weight": (D, F),
                f"layers.{i}.ffn.w3.weight": (F, D),
            }
        return shapes | {"ln_final.weight": (D,), "lm_head.weight": (V, D)}

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.weight_shapes().values())

    def flops_per_token(self, sequence_length: int | None = None) -> float:
        """Floating-point operations to train on one token: forward and backward, matrix products only.

            6·(weights in matrix products) + 12·L·D·S/2     (half the scores: the mask is causal)

        Source: Kaplan et al. 2020 §2.1; the attention term as in PaLM, appendix B, halved for causality.
        """
        S = sequence_length or self.context_length
        V, D, F, L = self.vocab_size, self.d_model, self.d_ff, self.num_layers
        return 6.0 * (L * (4 * D * D + 3 * D * F) + V * D) + 6.0 * L * D * S


def _stretches(scaling: tuple[float, ...]) -> bool:
    if len(scaling) != 4 or not all(isinstance(x, int | float) and math.isfinite(x) for x in scaling):
        return False
    factor, low, high, original = scaling
    return factor >= 1 and 0 < low < high and original >= 1
