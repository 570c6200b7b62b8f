"""One weight of a replayed step: how it moved, and which tokens pushed it.

A replay folder holds all that the step was computed from, so the optimizer takes it once more here, and must
leave the bits it left then.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from clinometer.gradients.attribute.attribute import attribute
from clinometer.gradients.attribute.result import Attribution, joined
from clinometer.gradients.attribute.tokens import Text
from clinometer.gradients.report.result import Result
from clinometer.gradients.sandbox.subject import UnknownName
from clinometer.gradients.step.explain_step import explain_step
from clinometer.lm import functional
from clinometer.lm.model import TransformerLM
from clinometer.lm.transformer_config import TransformerConfig
from clinometer.messages import LANGUAGES, InputError
from clinometer.optim.clipping import clip_grad_norm_
from clinometer.optim.make_optimizers import set_lr
from clinometer.record.replays.replays import TENSORS_FILE, Replay
from clinometer.training.checkpoints import checkpoint
from clinometer.training.replay.by_token import piece_size
from clinometer.training.replay.replay_folder import save_weight
from clinometer.training.run.computation import first_optimizers
from clinometer.training.settings.config import config_from
from clinometer.training.settings.precision import Choices

Index = tuple[int, ...]

TEXT_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class Explained:
    """A weight's step (a row's or a tensor's for a shorter index) and its gradient by token."""

    anatomy: Result
    attribution: Attribution

    def to_dict(self, name: str, index: Index) -> dict[str, Any]:
        """What weights/<hash>.json holds; `tokens` are the terms that add up to the gradient, (B, S)."""
        told: dict[str, Any] = {"name": name, "index": list(index)}
        for key, result in (("anatomy", self.anatomy), ("attribution", self.attribution)):
            told[key] = result.to_dict()
            told[f"{key}_text"] = {language: result.render(language, TEXT_WIDTH) for language in LANGUAGES}
        return told | {"tokens": told["attribution"]["matrix"]}


def explain_weight(path: Path, name: str, index: Index) -> Explained:
    """What the replayed step in the folder `path` did to a weight, and why; kept in the folder's weights/.

    Raises `InputError` if there is no such name or index.
    """
    with _Retaken.open(path) as step:
        name, index = step.place(name, index)
        attribution = step.attribution(name, index)
        anatomy = step.take(name)
        explained = Explained(
            anatomy=anatomy[name][index] if index else _whole(anatomy[name]), attribution=attribution
        )
        save_weight(path, name, index, explained.to_dict(name, index))
    return explained


def replayed_weight(folder: Path, step: int, name: str, index: Index) -> dict[str, Any]:
    """The row a live run records of a pinned weight (`Sink.weights`), from the replay of that step.

    As in a live row, the moments that the optimizer does not keep (`exp_avg` of SGD, all of them before its
    first step) are left out, and `momentum_buffer` has its own name. Raises `InputError` if the step was not
    replayed or not taken, and if there is no such name or index.
    """
    replay = Replay.open(folder, step)
    if replay is None or not replay.step_info["taken"]:
        raise InputError("explain.not_replayed", path=folder, step=step)
    with _Retaken.open(replay.path) as again:
        name, index = again.place(name, index)
        row: dict[str, Any] = {
            "tensor": replay.names.index(name),
            "index": list(index),
            **{key: float(again.tensors[f"{name}.{key}"][index]) for key in ("before", "after", "grad")},
            "clip": float(replay.step_info["clip"]),
            **again.moments(name, index, "before"),
        }
        again.take(name)
        group = again.group_of(name)
        row |= again.moments(name, index, "after")
    return row | {"lr": float(group["lr"]), "weight_decay": float(group.get("weight_decay", 0.0))}


def find_place(shapes: Mapping[str, tuple[int, ...]], name: str, index: Index) -> tuple[str, Index]:
    """The name and the index, counted from the front. Raises `InputError` if there is no such entry."""
    if name not in shapes:
        raise UnknownName(name, shapes)
    shape = shapes[name]
    sizes = shape[: len(index)]
    if len(index) > len(shape) or not all(-n <= i < n for i, n in zip(index, sizes, strict=True)):
        last = ",".join(str(n - 1) for n in shape)
        raise InputError("explain.index", name=name, shape=list(shape), index=list(index), last=last)
    return name, tuple(i % n for i, n in zip(index, sizes, strict=True))


class _Retaken:
    """The model and optimizers as they stood before the replayed step."""

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        self.path, self.info = path, info
        self.config = config_from(tomllib.loads(info["config"]))
        self.choices = Choices(**info["choices"])
        self.tensors = load_file(path / TENSORS_FILE, device=self.choices.device)
        self.model = TransformerLM(TransformerConfig(**info["model"])).to(self.choices.device)
        self.parameters = dict(self.model.named_parameters())
        self.model.load_state_dict({name: self.tensors[f"{name}.before"] for name in self.parameters})
        self.optimizers = first_optimizers(self.config, self.model)
        # The optimizer updates its state in place; `tensors` stays as it was read.
        kept = {
            k: v.clone() for k, v in self.tensors.items() if not k.endswith((".before", ".after", ".grad"))
        }
        for optimizer, groups in zip(self.optimizers, info["groups"], strict=True):
            checkpoint.restore_optimizer(path, optimizer, groups, kept)
        set_lr(self.optimizers, float(info["lr"]))

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[_Retaken]:
        replay = Replay.at(path)
        if replay is None:
            raise InputError("explain.damaged", path=path)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(Choices(**replay.step_info["choices"]).threads)
            retaken = cls(path, replay.step_info)
        except InputError:
            raise
        # The folder is not a replay of ours, even if its checksums fit.
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError("explain.damaged", path=path) from error
        finally:
            torch.set_num_threads(threads)
        torch.set_num_threads(retaken.choices.threads)
        try:
            yield retaken
        finally:
            torch.set_num_threads(threads)

    def place(self, name: str, index: Index) -> tuple[str, Index]:
        """The tensor's own name, and the index counted from the front."""
        return find_place({key: tuple(p.shape) for key, p in self.parameters.items()}, name, index)

    def take(self, name: str) -> Any:
        """Take the step; the anatomy has the tensor `name`. Raises `InputError` if other bits come out."""
        parameter = self.parameters[name]
        for key, p in self.parameters.items():
            grad = self.tensors.get(f"{key}.grad")
            p.grad = None if grad is None else grad.clone()
        with explain_step(self._owner(parameter), {name: parameter}) as anatomy:
            clip_grad_norm_(self.model.parameters(), self.config.optim.max_norm)
            for optimizer in self.optimizers:
                optimizer.step()
        if not all(torch.equal(p, self.tensors[f"{key}.after"]) for key, p in self.parameters.items()):
            raise InputError("explain.stale", path=self.path)
        losses = self.info["loss_before"], self.info["loss_after"]
        anatomy.within(float(self.info["predicted"]), (float(losses[0]), float(losses[1])))
        return anatomy

    def attribution(self, name: str, index: Index) -> Attribution:
        """The gradient of the weight or part, by token, at the weights before the step."""
        batch = self.info["batch"]
        token_ids, targets = (
            torch.tensor(batch[key], device=self.choices.device) for key in ("token_ids", "targets")
        )
        single = len(index) == self.parameters[name].dim()
        # A row's terms are taken along the whole batch's gradient, which no piece of it knows.
        size = piece_size(self.config, self.model.config.vocab_size) if single else len(token_ids)
        pieces = {
            i: text
            for row, said in zip(batch["token_ids"], batch["pieces"], strict=True)
            for i, text in zip(row, said, strict=True)
        }
        parts = [
            attribute(
                self.model,
                lambda ids=ids, wanted=wanted: self._loss(ids, wanted, targets.numel()),
                name,
                index if index or single else None,
                tokens=ids,
                decode=pieces.__getitem__,
            )
            for ids, wanted in zip(token_ids.split(size), targets.split(size), strict=True)
        ]
        return parts[0] if len(parts) == 1 else joined(parts, Text(token_ids, pieces.__getitem__))

    def moments(self, name: str, index: Index, when: str) -> dict[str, float]:
        """What the optimizer keeps of one weight now."""
        parameter = self.parameters[name]
        return {
            f"{key}_{when}": float(value[index])
            for key, value in self._owner(parameter).state.get(parameter, {}).items()
            if isinstance(value, Tensor) and value.shape == parameter.shape
        }

    def group_of(self, name: str) -> dict[str, Any]:
        parameter = self.parameters[name]
        groups = self._owner(parameter).param_groups
        return next(group for group in groups if any(p is parameter for p in group["params"]))

    def _owner(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        return next(
            o for o in self.optimizers if any(p is parameter for g in o.param_groups for p in g["params"])
        )

    def _loss(self, token_ids: Tensor, targets: Tensor, count: int) -> Tensor:
        """This part's share of the mean loss, by operations that attribution sees."""
        with self.choices.autocast():
            logits = functional.linear(self.model.hidden(token_ids), self.model.lm_head.weight)
            return functional.cross_entropy(logits, targets, reduction="sum") / count


def _whole(tensor: Any) -> Result:
    """The anatomy of a tensor; of one without axes, that of its only weight."""
    return tensor[()] if tensor.moved.before.dim() == 0 else tensor
