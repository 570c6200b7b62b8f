"""What a run is: every number that shapes it, validated once, readable and writable as TOML.

No torch here: the command line shows these fields in `--help` before anything heavy is imported.
What each field means stands in `messages/` under `config.<section>.<field>`, in both languages.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from clinometer.lm.transformer_config import TransformerConfig
from clinometer.messages import InputError

LARGEST_SEED = 2**62
"""Torch takes 64 bits; a sample adds the step to it."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The Transformer's sizes; its vocabulary is the tokenizer's."""

    context_length: int = 256
    d_model: int = 256
    num_layers: int = 4
    num_heads: int = 4
    d_ff: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        self.transformer(vocab_size=1)

    def transformer(self, vocab_size: int) -> TransformerConfig:
        """The model's configuration for this vocabulary; d_ff defaults to 8/3·d_model, rounded up to 32."""
        d_ff = self.d_ff
        if d_ff is None and isinstance(self.d_model, int):
            d_ff = math.ceil(self.d_model * 8 / 3 / 32) * 32
        return TransformerConfig(
            vocab_size=vocab_size,
            context_length=self.context_length,
            d_model=self.d_model,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            d_ff=d_ff,  # pyright: ignore[reportArgumentType]  (TransformerConfig refuses None)
            rope_theta=self.rope_theta,
            rope_scaling=self.rope_scaling,
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text and how it becomes tokens."""

    corpus: str = "python"
    tokenizer: str = "bpe"
    vocab_size: int | None = None
    validation_fraction: float = 0.1

    def __post_init__(self) -> None:
        if not self.corpus:
            raise InputError("config.empty_corpus")
        if self.vocab_size is not None:
            _at_least("data.vocab_size", self.vocab_size, 1)
        _between("data.validation_fraction", self.validation_fraction, 0.0001, 0.5)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and the limit on the gradient's norm."""

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float | None = None
    max_norm: float = 1.0
    embedding_lr: float | None = None

    def __post_init__(self) -> None:
        _one_of("optim.name", self.name, ("adamw", "sgd", "muon"))
        _between("optim.lr", self.lr, 0.0, math.inf)
        _between("optim.weight_decay", self.weight_decay, 0.0, math.inf)
        if self.momentum is not None:
            _between("optim.momentum", self.momentum, 0.0, 1.0, open_end=True)
        if self.embedding_lr is not None:
            _between("optim.embedding_lr", self.embedding_lr, 0.0, math.inf)
            if self.lr == 0:
                raise InputError("optim.embedding_lr", embedding_lr=self.embedding_lr)
        if not (math.isfinite(self.eps) and self.eps > 0):  # a weight never pushed would be 0/0
            raise InputError("config.above_zero", field="optim.eps", value=self.eps)
        if len(self.betas) != 2:
            raise InputError("config.pair", field="optim.betas", value=list(self.betas))
        for beta in self.betas:
            _between("optim.betas", beta, 0.0, 1.0, open_end=True)
        if not self.max_norm > 0:
            raise InputError("config.above_zero", field="optim.max_norm", value=self.max_norm)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves from step to step."""

    name: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup_steps: int | None = None
    min_lr: float | None = None
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        _one_of("schedule.name", self.name, ("cosine", "constant", "wsd"))
        for name in ("warmup_steps", "decay_steps"):
            if getattr(self, name) is not None:
                _at_least(f"schedule.{name}", getattr(self, name), 0)
        if self.min_lr is not None:
            _between("schedule.min_lr", self.min_lr, 0.0, math.inf)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how much at a time, and what is kept."""

    steps: int = 2000
    batch_size: int = 16
    micro_batch_size: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    eval_every: int | None = None
    eval_batches: int = 16
    sample_every: int | None = None
    sample_tokens: int = 128
    sample_prompt: str = ""
    checkpoint_every: int | None = None
    keep: int = 2
    max_skipped: int = 10
    watch_every: int = 1
    parallel: Literal["auto", "fsdp", "ddp"] = "auto"
    activation_checkpointing: bool = False
    async_checkpoints: bool = False
    rank_patience: int = 60

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_batches", "keep", "max_skipped", "rank_patience"):
            _at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("eval_every", "sample_every", "checkpoint_every", "micro_batch_size"):
            if getattr(self, name) is not None:
                _at_least(f"training.{name}", getattr(self, name), 1)
        _at_least("training.seed", self.seed, 0)
        if self.seed > LARGEST_SEED:
            raise InputError("config.seed", field="training.seed", value=self.seed, largest=LARGEST_SEED)
        _at_least("training.sample_tokens", self.sample_tokens, 0)
        _at_least("training.watch_every", self.watch_every, 0)
        _one_of("training.precision", self.precision, ("auto", "float32", "bfloat16"))
        _one_of("training.compile", self.compile, ("auto", "on", "off"))
        _one_of("training.parallel", self.parallel, ("auto", "fsdp", "ddp"))
        for name in ("activation_checkpointing", "async_checkpoints"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(
                    "config.one_of",
                    field=f"training.{name}",
                    value=getattr(self, name),
                    choices="true, false",
                )
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise InputError("config.micro_batch", batch_size=self.batch_size, micro_batch_size=micro)


FREE_ON_RESUME = {
    "training.steps",
    "training.eval_every",
    "training.eval_batches",
    "training.sample_every",
    "training.sample_tokens",
    "training.sample_prompt",
    "training.checkpoint_every",
    "training.keep",
    "training.max_skipped",
    "training.watch_every",
    "training.parallel",
    "training.activation_checkpointing",
    "training.async_checkpoints",
    "training.rank_patience",
}
"""Fields a resumed run may change: none of them alters a step already taken."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that makes a run: with the same corpus, the same machine gives the same bits."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        schedule, steps = self.schedule, self.training.steps
        if schedule.warmup_steps is not None and schedule.warmup_steps > steps:
            raise InputError("config.warmup", warmup_steps=schedule.warmup_steps, steps=steps)
        if schedule.min_lr is not None and schedule.min_lr > self.optim.lr:
            raise InputError("config.min_lr", min_lr=schedule.min_lr, lr=self.optim.lr)

    @property
    def warmup_steps(self) -> int:
        """As given, else a twentieth of the run and at most 200 steps."""
        given = self.schedule.warmup_steps
        return min(200, self.training.steps // 20) if given is None else given

    @property
    def min_lr(self) -> float:
        """As given, else a tenth of the highest (Chinchilla's choice; Hoffmann et al. 2022)."""
        return self.optim.lr / 10 if self.schedule.min_lr is None else self.schedule.min_lr

    @property
    def decay_steps(self) -> int:
        """The last part of a warmup-stable-decay run: as given, else a fifth of it."""
        return self.training.steps // 5 if self.schedule.decay_steps is None else self.schedule.decay_steps

    @property
    def eval_every(self) -> int:
        return self.training.eval_every or max(1, self.training.steps // 10)

    @property
    def sample_every(self) -> int:
        return self.training.sample_every or max(1, self.training.steps // 4)

    @property
    def checkpoint_every(self) -> int:
        return self.training.checkpoint_every or max(1, self.training.steps // 5)

    @property
    def micro_batch_size(self) -> int:
        return self.training.micro_batch_size or self.training.batch_size

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested plain values; fields left to their default rule (None) are left out, as TOML has no null."""
        nested = dataclasses.asdict(self)
        return {
            section: {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in fields.items()
                if value is not None
            }
            for section, fields in nested.items()
        }

    def to_toml(self) -> str:
        import tomli_w

        return tomli_w.dumps(self.to_dict())


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "schedule": ScheduleConfig,
    "training": TrainingConfig,
}


def config_from(table: dict[str, dict[str, Any]]) -> RunConfig:
    """The configuration with these values in place of the defaults."""
    sections = {}
    for section, values in table.items():
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        sections[section] = SECTIONS[section](**values)
    return RunConfig(**sections)


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Fields that differ, by dotted name: (old value, new value)."""
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    return {
        f"{section}.{name}": (before[section][name], value)
        for section, fields in after.items()
        for name, value in fields.items()
        if before[section][name] != value
    }


def _at_least(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InputError("config.at_least", field=name, value=value, low=low)


def _between(name: str, value: Any, low: float, high: float, open_end: bool = False) -> None:
    good = isinstance(value, int | float) and math.isfinite(value) and low <= value
    if not (good and (value < high if open_end else value <= high)):
        raise InputError(
            "config.between_open" if open_end else "config.between",
            field=name,
            value=value,
            low=low,
            high=high,
        )


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
        raise InputError(
            "config.one_of_near" if near else "config.one_of",
            field=name,
            value=value,
            choices=", ".join(choices),
            near=near[0] if near else "",
        )
