"""What computes a run's steps: its text, model and optimizers; the same for training and for replaying."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clinometer.lm.model import TransformerLM
from clinometer.optim.choice import make_optimizers
from clinometer.text.shards import TokenData
from clinometer.text.tokenizer import Tokenizer
from clinometer.training.config import RunConfig
from clinometer.training.precision import Choices


@dataclass(kw_only=True)
class Computation:
    """A run's text, model and optimizers. `step` counts the steps that are done."""

    config: RunConfig
    choices: Choices
    tokenizer: Tokenizer
    data: TokenData
    model: TransformerLM
    optimizers: list[torch.optim.Optimizer]
    step: int = 0


def first_model(config: RunConfig, choices: Choices, vocab_size: int) -> TransformerLM:
    """The model as a run begins with it: a pure function of the configuration; torch's generators are set."""
    torch.manual_seed(config.training.seed)
    generator = torch.Generator().manual_seed(config.training.seed)
    model = TransformerLM(config.model.transformer(vocab_size), generator=generator).to(choices.device)
    if choices.compile:
        model.compile_parts(onednn=choices.onednn)
    return model


def first_optimizers(config: RunConfig, model: TransformerLM) -> list[torch.optim.Optimizer]:
    """The run's optimizers, before their first step."""
    optim = config.optim
    return make_optimizers(
        model.named_parameters(),
        name=optim.name,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        embedding_lr=optim.embedding_lr,
    )
