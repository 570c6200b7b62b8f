"""A run's model, ready to use; and a run made from an imported model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from clinometer.lm.llama_files import import_llama
from clinometer.lm.model import TransformerLM
from clinometer.lm.transformer_config import TransformerConfig
from clinometer.messages import InputError
from clinometer.text.corpus import open_corpus
from clinometer.text.tokenizer import Tokenizer
from clinometer.training.checkpoints import checkpoint
from clinometer.training.run.run_folder import RunFolder
from clinometer.training.settings.config import ModelConfig, RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """The weights of one checkpoint, with the tokenizer they were trained with."""

    model: TransformerLM
    tokenizer: Tokenizer
    step: int
    path: Path
    state: dict[str, Any]

    @property
    def separated(self) -> bool:
        """Whether the model has seen end-of-text: a corpus of one document has none."""
        return bool(self.state.get("separated", True))


def load_run(path: Path, which: str = "best", device: str | torch.device = "cpu") -> Trained:
    """The model of the run in `path`: its "best" checkpoint by validation loss, its "last", or a step's.

    Raises `InputError` if it is no run, has no such checkpoint, or the checkpoint is damaged.
    """
    folder = RunFolder.open(path)
    saved = {checkpoint.step_of(p): p for p in checkpoint.checkpoints(folder.checkpoints)}
    if not saved:
        raise InputError("run.no_checkpoint", path=path)
    newest = max(saved)
    if which == "last":
        step = newest
    elif which == "best":
        best = checkpoint.read_state(saved[newest]).get("best_step")
        step = best if best in saved else newest
    else:
        step = int(which) if which.isdecimal() else -1
    if step not in saved:
        known = ", ".join(str(s) for s in sorted(saved))
        raise InputError("run.no_such_checkpoint", path=path, step=which, steps=known)
    state = checkpoint.read_state(saved[step])
    if "model" not in state:
        raise InputError("checkpoint.malformed", path=saved[step], what="model")
    config = TransformerConfig(**state["model"])
    checkpoint.require_weights(saved[step], state, config)
    model = TransformerLM(config)
    checkpoint.load_checkpoint(saved[step], model)
    return Trained(
        model=model.to(device).eval(),
        tokenizer=Tokenizer.load(folder.tokenizer),
        step=step,
        path=saved[step],
        state=state,
    )


def import_run(source: Path, path: Path, config: RunConfig) -> RunFolder:
    """A new run whose step 0 is the Llama-type model in the folder `source`; `train --resume` tunes it.

    `config` gives everything but the model's sizes. Raises `InputError` if the model cannot be represented,
    and for a corpus that is not there.
    """
    model_config, weights = import_llama(source)
    tokenizer = Tokenizer.load(source)
    sizes = {f.name: getattr(model_config, f.name) for f in dataclasses.fields(ModelConfig)}
    config = dataclasses.replace(config, model=ModelConfig(**sizes))
    if config.data.corpus != "-":
        open_corpus(config.data.corpus)  # or the mistake would be found when it is tuned
    folder = RunFolder.create(path, config)
    try:
        tokenizer.save(folder.tokenizer)
        model = TransformerLM(model_config)
        model.load_state_dict(weights)
        checkpoint.save_checkpoint(
            folder.checkpoints,
            0,
            model,
            [],
            {
                "config": folder.config.to_dict(),
                "model": dataclasses.asdict(model_config),
                "choices": None,
                "data": None,
                "metrics_bytes": 0,
                "skipped_bytes": 0,
                "skipped_in_a_row": 0,
                "best_loss": None,
                "best_step": None,
            },
        )
    finally:
        folder.unlock()
    return folder
