"""What computes a run's steps: its text, model and optimizers; the same for training and for replaying."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clinometer.lm.model import TransformerLM
from clinometer.optim.make_optimizers import make_optimizers
from clinometer.optim.schedule import constant_schedule, cosine_schedule, warmup_stable_decay_schedule
from clinometer.text import sampler
from clinometer.text.token_shards import TokenData
from clinometer.text.tokenizer import Tokenizer
from clinometer.training.ranks.fsdp import sharded_model
from clinometer.training.ranks.world import World
from clinometer.training.settings.config import RunConfig
from clinometer.training.settings.precision import Choices

EAGER_STEPS = 1
"""A run's first step is eager even if the run is compiled: seconds after the start it tells that text, sizes
and loss are what they should be, and the compiler's tens of seconds come after it."""


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
    world: World = field(default_factory=World)
    compiled: bool = False

    def compile_is_due(self) -> bool:
        """Whether the next step is the first one of this process that is to be compiled."""
        return self.choices.compile and not self.compiled and self.step >= EAGER_STEPS

    def take_form(self) -> AbstractContextManager[object]:
        """The form in which the next step computes: a function of its number alone, so that a resumed or
        replayed step computes as it did the first time."""
        if self.compile_is_due():
            self.model.compile_parts(onednn=self.choices.onednn, without_hooks=self.world.kind == "fsdp")
            self.compiled = True
        return self.choices.uncompiled() if self.compiled and self.step < EAGER_STEPS else nullcontext()


def first_model(
    config: RunConfig, choices: Choices, vocab_size: int, world: World | None = None
) -> TransformerLM:
    """The model as a run begins with it: a pure function of the configuration; torch's generators are set.

    With FSDP this rank's parts of it, the same numbers.
    """
    torch.manual_seed(config.training.seed)
    generator = torch.Generator().manual_seed(config.training.seed)
    sizes = config.model.transformer(vocab_size)
    if world is not None and world.kind == "fsdp":
        return sharded_model(sizes, generator, world)
    model = TransformerLM(sizes, generator=generator).to(choices.device)
    if world is not None:
        world.wrap(model)
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


def batch_of(computation: Computation, step: int) -> tuple[Tensor, Tensor]:
    """Token ids and targets of a step, (B, S) each: a pure function of the seed and the step.

    Of several ranks, this one's windows of the same batch.
    """
    config, world = computation.config, computation.world
    arrays = sampler.batch(
        computation.data.train,
        context_length=config.model.context_length,
        batch_size=config.training.batch_size,
        seed=config.training.seed,
        step=step,
        rank=world.rank,
        world_size=world.size,
    )
    token_ids, targets = (torch.from_numpy(a).to(computation.choices.device) for a in arrays)
    return token_ids, targets


def learning_rate(config: RunConfig, step: int) -> float:
    """The rate of step 1 … steps: the first step is 1/warmup of the way up, the last has the lowest rate."""
    warmup, steps, lr = config.warmup_steps, config.training.steps, config.optim.lr
    match config.schedule.name:
        case "constant":
            return constant_schedule(step, lr, warmup)
        case "wsd":
            return warmup_stable_decay_schedule(step, lr, config.min_lr, warmup, steps, config.decay_steps)
        case "cosine":
            return cosine_schedule(step, lr, config.min_lr, warmup, steps)
        case other:
            raise AssertionError(f"a schedule that settings allow and the loop does not know: {other}")
