"""From a name to optimizers: which parameter goes to which, and which ones decay.

Weights with two or more dimensions decay; vectors (the norms' weights) do not, since a norm's weight near
zero switches its layer off. The rule is nanoGPT's (`configure_optimizers`), after GPT-3's training.

Muon (Jordan et al. 2024) replaces a matrix's update by the nearest orthogonal one. It is for matrices
between two activations: the embeddings and the head, whose rows are tokens, and the norms stay with AdamW.
Its update is rescaled to the size of AdamW's (Liu et al. 2025, §2.2), so one `lr` serves both.

The embeddings may have a rate of their own: a token's row moves only when the token comes, and what a row
writes is normalised before anything reads it, so a few times the others' rate is often better (docs/log.md).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from clinometer.messages import InputError, say
from clinometer.optim.adamw import AdamW
from clinometer.optim.argument_checks import require_fraction, require_nonnegative
from clinometer.optim.muon import Muon
from clinometer.optim.sgd import SGD

OPTIMIZERS = ("adamw", "sgd", "muon")

Named = tuple[str, Tensor]


def make_optimizers(
    named_parameters: Iterable[Named],
    *,
    name: str = "adamw",
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    momentum: float | None = None,
    embedding_lr: float | None = None,
) -> list[Optimizer]:
    """The optimizers called `name` for a model's parameters: one, or for "muon" Muon, then AdamW.

    Each group carries a `name` ("matrices", "embeddings", "decayed", "not decayed"), and state dicts the
    parameters' names. `momentum`: μ of SGD (default 0) or Muon (default 0.95). `betas`, `eps`: AdamW's.
    `embedding_lr` puts `token_embeddings` into a group of its own; who changes the rates later multiplies by
    a group's `lr_factor` (1 if it has none; `set_lr` does so). A tied weight counts once, under its first
    name. Raises `InputError` for an unknown name, for no parameters, and for `embedding_lr` without an `lr`.
    """
    if name not in OPTIMIZERS:
        close = difflib.get_close_matches(str(name), OPTIMIZERS, n=1, cutoff=0.3)
        suggestion = say("optim.did_you_mean", name=close[0]) if close else ""
        raise InputError("optim.name", value=name, known=", ".join(OPTIMIZERS), suggestion=suggestion)
    named = _distinct(named_parameters)
    if not named:
        raise InputError("optim.no_parameters")
    # Muon has its own checks, in its own words.
    require_nonnegative("lr", lr, "1e-3")
    require_nonnegative("weight_decay", weight_decay, "0.01")
    if momentum is not None:
        require_fraction("momentum", momentum, "0.9")
    if embedding_lr is not None:
        require_nonnegative("embedding_lr", embedding_lr, "3 * lr")
        if lr == 0:
            raise InputError("optim.embedding_lr", embedding_lr=embedding_lr)

    optimizers: list[Optimizer] = []
    if name == "muon":
        matrices = [(key, parameter) for key, parameter in named if _is_hidden_matrix(key, parameter)]
        named = [(key, parameter) for key, parameter in named if not _is_hidden_matrix(key, parameter)]
        if matrices:
            optimizers.append(
                Muon(
                    [{"params": matrices, "name": "matrices"}],
                    lr=lr,
                    weight_decay=weight_decay,
                    momentum=0.95 if momentum is None else momentum,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
    groups = []
    if embedding_lr is not None:
        embeddings = [pair for pair in named if _is_embedding(pair[0])]
        named = [pair for pair in named if not _is_embedding(pair[0])]
        if embeddings:
            own = {"lr": embedding_lr, "lr_factor": embedding_lr / lr, "weight_decay": weight_decay}
            groups.append({"params": embeddings, "name": "embeddings", **own})
    groups += _by_decay(named, weight_decay)
    if groups and name == "sgd":
        optimizers.append(SGD(groups, lr=lr, momentum=momentum or 0.0))
    elif groups:
        optimizers.append(AdamW(groups, lr=lr, betas=betas, eps=eps))
    return optimizers


def set_lr(optimizers: Iterable[Optimizer], lr: float) -> None:
    """The rate of every group: `lr` times its factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)


def _distinct(named_parameters: Iterable[Named]) -> list[Named]:
    first: dict[int, Named] = {}
    for key, parameter in named_parameters:
        first.setdefault(id(parameter), (key, parameter))
    return list(first.values())


def _is_hidden_matrix(key: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and "layers" in key.split(".")


def _is_embedding(key: str) -> bool:
    return "token_embeddings" in key.split(".")


def _by_decay(named: list[Named], weight_decay: float) -> list[dict[str, Any]]:
    decayed = [(key, parameter) for key, parameter in named if parameter.ndim >= 2]
    others = [(key, parameter) for key, parameter in named if parameter.ndim < 2]
    groups = [
        {"params": decayed, "name": "decayed", "weight_decay": weight_decay},
        {"params": others, "name": "not decayed", "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
