"""What each token of a batch adds: to the loss, and to the gradient of every tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from clinometer.gradients.attribute.contraction import Use
from clinometer.gradients.attribute.use_recorder import UseRecorder
from clinometer.gradients.sandbox.closure import eagerly
from clinometer.lm import functional
from clinometer.lm.model import CHUNKED_LOSS_VOCABULARY, TransformerLM
from clinometer.training.settings.config import RunConfig
from clinometer.training.settings.precision import Choices


class ByToken(NamedTuple):
    """B sequences of S tokens, T tensors in the model's order; all on the CPU."""

    losses: Tensor
    """(B, S)"""
    norms: Tensor | None = None
    """‖∂L/∂x‖ of each token's embedding x, L the mean loss, (B, S)."""
    shares: Tensor | None = None
    """‖δ xᵀ‖, what a position adds to a tensor's gradient, float32 (T, B, S).

    NaN where it cannot be computed, infinite where δ or x is not finite.
    """


def piece_size(config: RunConfig, vocab_size: int) -> int:
    """Sequences that are computed at once: all their logits are in memory, which training avoids."""
    return 1 if vocab_size >= CHUNKED_LOSS_VOCABULARY else config.micro_batch_size


def by_token(
    model: TransformerLM,
    choices: Choices,
    token_ids: Tensor,
    targets: Tensor,
    size: int,
    *,
    gradient: bool = True,
) -> ByToken:
    """The loss at each position, and with `gradient` what each position adds to the gradients.

        ∂L/∂W = Σ over positions (b, s) of δ[b, s] x[b, s]ᵀ        share of (b, s): ‖δ[b, s]‖ ‖x[b, s]‖

    Computed in the run's precision and uncompiled, `size` sequences at a time, in one forward and one
    backward that makes no weight's gradient.
    """
    weights = dict(model.named_parameters()) if gradient else {}
    losses, norms, shares = [], [], []
    with eagerly(), torch.set_grad_enabled(gradient):
        for part in range(0, len(token_ids), size):
            ids, wanted = token_ids[part : part + size], targets[part : part + size]
            # δ and x of a position become one number as soon as δ comes; neither is kept.
            watched = UseRecorder(weights, dict.fromkeys(weights, _squared))
            try:
                with choices.autocast(), watched if gradient else nullcontext():
                    x_BSD = functional.embedding(ids, model.token_embeddings.weight)
                    logits = functional.linear(model.hidden_from(x_BSD), model.lm_head.weight)
                    loss = functional.cross_entropy(logits, wanted, reduction="none")
                if gradient:
                    watched.armed = True
                    (grad,) = torch.autograd.grad(loss.sum() / targets.numel(), x_BSD)
                    norms.append(torch.linalg.vector_norm(grad, dim=-1).cpu())
                    shares.append(_shares(watched, weights, ids.shape))
            finally:
                watched.remove_hooks()
            losses.append(loss.detach().cpu())
    if not gradient:
        return ByToken(torch.cat(losses))
    return ByToken(torch.cat(losses), torch.cat(norms), torch.cat(shares, dim=1))


def _squared(use: Use) -> Tensor:
    return use.squared(None)


def _shares(watched: UseRecorder, weights: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """(T, *shape). Of a tensor used twice, or in a way that was not seen, the norm is not the uses' sum."""
    found = torch.full((len(weights), *shape), math.nan)
    for row, name in zip(found, weights, strict=True):
        uses = watched.uses_of(name)
        if len(uses) == 1 and not watched.unseen[name] and uses[0].lead == tuple(shape):
            squared = uses[0].reduced
            if squared is not None:
                row.copy_(squared.sqrt().nan_to_num(nan=math.inf, posinf=math.inf))
    return found
