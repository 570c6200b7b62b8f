"""The language model as an nn.Module: it holds the weights and calls `functional`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clinometer.lm import functional
from clinometer.lm.functional import LayerCache, Rotation
from clinometer.lm.transformer_config import TransformerConfig

CHUNKED_LOSS_VOCABULARY = 32_768
"""From this vocabulary on, `TransformerLM.loss` never holds all the logits. Measured on two cores at width
768 and 4,096 tokens: at V = 50,257 a tenth of the memory and 0.8 of the time, at V = 10,000 slower."""


def initial_weights(config: TransformerConfig, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Fresh float32 weights, drawn in the order data flows.

        linear (out, in):  N(0, 2/(in+out)) cut at ±3σ      Glorot & Bengio 2010, eq. 16's variance
        embedding:         N(0, 1)          cut at ±3       unit scale, what the first norm makes of it anyway
        norms:             1

    attn.output_proj and ffn.w2, which write to the residual stream, start 1/√(2L) smaller so that its
    variance does not grow with depth (Radford et al. 2019 §2.3).
    """
    return dict(draw_weights(config, generator))


def draw_weights(
    config: TransformerConfig, generator: torch.Generator | None = None
) -> Iterator[tuple[str, Tensor]]:
    """`initial_weights` one after the other, for who keeps only a part of each."""
    residual_scale = (2 * config.num_layers) ** -0.5
    for name, shape in config.weight_shapes().items():
        weight = torch.empty(shape, device="cpu")
        if len(shape) == 1:
            nn.init.ones_(weight)
        else:
            std = 1.0 if name == "token_embeddings.weight" else (2.0 / sum(shape)) ** 0.5
            if name.endswith(("attn.output_proj.weight", "ffn.w2.weight")):
                std *= residual_scale
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)
        yield name, weight


class Weight(nn.Module):
    """A named place for one weight, so that state-dict names read `….q_proj.weight`."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def extra_repr(self) -> str:
        return "×".join(str(size) for size in self.weight.shape)


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        D = config.d_model
        self.q_proj = Weight(D, D)
        self.k_proj = Weight(D, D)
        self.v_proj = Weight(D, D)
        self.output_proj = Weight(D, D)


class FeedForward(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        D, F = config.d_model, config.d_ff
        self.w1 = Weight(F, D)
        self.w2 = Weight(D, F)
        self.w3 = Weight(F, D)


class TransformerBlock(nn.Module):
    """The weights of one block; `functional.transformer_block` is what it computes."""

    recompute = False
    """Whether a training forward keeps only the block's input, and the backward computes the rest once more
    (Chen et al. 2016): the same bits, about a third more time, and the memory of one block instead of all."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.compiled_form: Callable[..., Tensor] | None = None
        self.ln1 = Weight(config.d_model)
        self.attn = Attention(config)
        self.ln2 = Weight(config.d_model)
        self.ffn = FeedForward(config)

    def forward(self, x_BSD: Tensor, rotation: Rotation, cache: LayerCache | None = None) -> Tensor:
        if self.recompute and cache is None and torch.is_grad_enabled():
            # Inside the block and not around it: FSDP's hooks are on the call, and gather once for both.
            return checkpoint(self._compute, x_BSD, rotation, use_reentrant=False)
        return self._compute(x_BSD, rotation, cache)

    def _compute(self, x_BSD: Tensor, rotation: Rotation, cache: LayerCache | None = None) -> Tensor:
        # Written out: get_parameter(name) nine times a block was a third of a cached token's overhead.
        weights = {
            "ln1.weight": self.ln1.weight,
            "attn.q_proj.weight": self.attn.q_proj.weight,
            "attn.k_proj.weight": self.attn.k_proj.weight,
            "attn.v_proj.weight": self.attn.v_proj.weight,
            "attn.output_proj.weight": self.attn.output_proj.weight,
            "ln2.weight": self.ln2.weight,
            "ffn.w1.weight": self.ffn.w1.weight,
            "ffn.w2.weight": self.ffn.w2.weight,
            "ffn.w3.weight": self.ffn.w3.weight,
        }
        if self.compiled_form is not None and cache is None and torch.compiler.is_compiling():
            return self.compiled_form(weights, x_BSD, self.num_heads, rotation)
        return functional.transformer_block(weights, x_BSD, self.num_heads, rotation=rotation, cache=cache)


class TransformerLM(nn.Module):
    """A decoder-only Transformer: `model(token_ids)` are the logits that
    `transformer_lm(dict(model.named_parameters()), token_ids, model.config)` gives, bit for bit.

    The weights are `initial_weights(config, generator)`, float32; on the meta device there are none.
    """

    def __init__(self, config: TransformerConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.token_embeddings = Weight(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.ln_final = Weight(config.d_model)
        self.lm_head = Weight(config.vocab_size, config.d_model)
        if not self.lm_head.weight.is_meta:
            self.load_state_dict(initial_weights(config, generator))
        self._head_loss = head_loss

    def hidden(self, token_ids: Tensor, caches: Sequence[LayerCache] | None = None, start: int = 0) -> Tensor:
        """The residual stream after the final norm, (B, S, D); `start` is the first token's position."""
        functional.check_length(start + token_ids.shape[-1], self.config)
        x_BSD = functional.embedding(token_ids, self.token_embeddings.weight)
        return self.hidden_from(x_BSD, caches, start)

    def hidden_from(
        self, x_BSD: Tensor, caches: Sequence[LayerCache] | None = None, start: int = 0
    ) -> Tensor:
        """`hidden` of tokens whose embeddings are `x_BSD`: what follows the lookup."""
        config = self.config
        positions = torch.arange(start, start + x_BSD.shape[-2], device=x_BSD.device)
        rotation = functional.rotary_table(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        for i, block in enumerate(self.layers):
            x_BSD = block(x_BSD, rotation, caches[i] if caches is not None else None)
        return functional.rms_norm(x_BSD, self.ln_final.weight)

    def forward(
        self,
        token_ids: Tensor,
        caches: Sequence[LayerCache] | None = None,
        start: int = 0,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Logits, (B, S, V). With `caches` (one a layer), `token_ids` stand at positions start, start+1, …

        `last_only` gives those of the last position, (B, 1, V): a prompt's other logits are never computed.
        """
        x_BSD = self.hidden(token_ids, caches, start)
        if last_only:
            x_BSD = x_BSD[..., -1:, :]
        return functional.linear(x_BSD, self.lm_head.weight)

    def loss(self, token_ids: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
        """`cross_entropy(self(token_ids), targets)`, in the form that suits the vocabulary's size."""
        return self._head_loss(self.hidden(token_ids), self.lm_head.weight, targets, reduction)

    def recompute_blocks(self, on: bool = True) -> None:
        """Keep the blocks' inputs only, and compute what is between them again in the backward."""
        for block in self.layers:
            assert isinstance(block, TransformerBlock)
            block.recompute = on

    def compile_parts(self, *, onednn: bool = False, without_hooks: bool = False) -> None:
        """Compile each block and the loss, not the whole model; on a CPU in the form of `compiled_step.py`.

        It takes seconds instead of tens, and leaves out the embedding's backward, which when compiled adds
        up atomically in an order that changes from run to run: no exact resume. `onednn`: let oneDNN compute
        the float32 products (see `compiled_step.onednn_is_faster`). `without_hooks` leaves out what hooks do
        around a block, such as FSDP's, which gathers its weights.
        """
        for block in self.layers:
            if without_hooks:
                block.forward = torch.compile(block.forward)
            else:
                block.compile()
        self._head_loss = torch.compile(head_loss)
        large = self.config.vocab_size >= CHUNKED_LOSS_VOCABULARY
        if self.lm_head.weight.device.type != "cpu":
            if large:
                self._head_loss = head_loss
            return
        from clinometer.lm import chunked_loss, compiled_step

        for block in self.layers:
            block.compiled_form = partial(compiled_step.transformer_block, onednn=onednn)  # pyright: ignore
        if large:
            self._head_loss = partial(chunked_loss.head_loss, onednn=onednn)
        else:
            self._head_loss = torch.compile(partial(compiled_step.head_loss, onednn=onednn))


def head_loss(x_BSD: Tensor, head_weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """From the final norm to the loss."""
    if head_weight.shape[0] >= CHUNKED_LOSS_VOCABULARY:
        return functional.linear_cross_entropy(x_BSD, head_weight, targets, reduction=reduction)
    return functional.cross_entropy(functional.linear(x_BSD, head_weight), targets, reduction=reduction)
