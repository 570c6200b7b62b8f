"""Checkpoints: a folder that exists only once its last byte is on the disk. safetensors and JSON, no pickle.

    step-00001000/
        model.safetensors        the weights, by name
        optimizer.safetensors    the optimizer's tensors, "<weight's name>.<key>"
        state.json               step, groups, random states, and the size and SHA-256 of the two files

Ranks that hold a model in parts write a pair each, model-00001-of-00002.safetensors and so on (parts.py).
It is written under a temporary name, synced, and renamed: the rename is the commit.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from clinometer.foreign_files import parse_json
from clinometer.lm.transformer_config import TransformerConfig
from clinometer.messages import InputError
from clinometer.training.checkpoints.checkpoint_parts import Stored, split_shapes
from clinometer.training.checkpoints.checkpoint_state import group_names, require_state
from clinometer.training.checkpoints.generator_state import random_state
from clinometer.whole_files import commit_folder, sync_file, temporary_name, write_whole

FORMAT = 1
IN_PARTS = 2
"""Format of a checkpoint that several ranks wrote, each its part."""
_NAME = re.compile(r"step-(\d{8,})")


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in `folder`, oldest first."""
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and (p / "state.json").is_file()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    more: Mapping[str, Any],
) -> Path:
    """Write `folder/step-…` whole or not at all, and return it.

    Raises `InputError` if it cannot be written (no space, no permission); what was there before stays.
    """
    return write_checkpoint(folder, take_snapshot(step, model, optimizers, more))


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold: this process's tensors by file and name, and the rest of state.json."""

    step: int
    files: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

    @property
    def folder_name(self) -> str:
        return f"step-{self.step:08d}"

    def copied(self) -> Snapshot:
        """The same in memory of its own on the host, while training changes the tensors."""
        files = {
            name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}
            for name, tensors in self.files.items()
        }
        return replace(self, files=files)


def take_snapshot(
    step: int,
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    more: Mapping[str, Any],
    *,
    rank: int = 0,
    size: int = 1,
) -> Snapshot:
    """The model and optimizers as they stand: what this rank is to write of them. Nothing is copied."""
    tensors, groups = flatten(optimizers)
    kinds = {"model": {n: t.detach() for n, t in model.state_dict().items()}, "optimizer": tensors}
    state: dict[str, Any] = {"optimizers": groups, "random": random_state(), **more}
    split = {kind: split_shapes(held) for kind, held in kinds.items()}
    if not any(split.values()):  # a whole one, which the first rank writes
        files = {f"{kind}.safetensors": held for kind, held in kinds.items()} if rank == 0 else {}
        return Snapshot(step, files, {"format": FORMAT, **state})
    files = {
        f"{kind}-{rank + 1:05}-of-{size:05}.safetensors": {
            key: tensor.to_local() if key in split[kind] else tensor  # pyright: ignore[reportCallIssue]
            for key, tensor in held.items()
            if key in split[kind] or rank == 0
        }
        for kind, held in kinds.items()
    }
    return Snapshot(step, files, {"format": IN_PARTS, "parts": {"count": size, "split": split}, **state})


def write_checkpoint(folder: Path, snapshot: Snapshot) -> Path:
    """Write `folder/step-…` whole or not at all, and return it. Raises as `save_checkpoint` does."""
    final = folder / snapshot.folder_name
    partial = temporary_name(final)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        # `folder` is not made here: a run folder that was deleted must not come back as half of one.
        partial.mkdir()
        commit(final, partial, snapshot, write_files(partial, snapshot))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError("checkpoint.not_written", path=final, reason=reason_of(error)) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def write_files(partial: Path, snapshot: Snapshot) -> dict[str, Any]:
    """Write this process's files and wait until they are on the disk; their fingerprints."""
    for name, tensors in snapshot.files.items():
        save_tensors(partial / name, tensors)
    return {name: fingerprint(partial / name) for name in snapshot.files}


def commit(final: Path, partial: Path, snapshot: Snapshot, files: Mapping[str, Any]) -> None:
    """Once every file is there: state.json, and the rename."""
    state = {"format": snapshot.state["format"], "step": snapshot.step, "files": files} | snapshot.state
    state["sha256"] = digest(state)
    write_whole(partial / "state.json", json.dumps(state, indent=1))
    if final.exists() and _holds(final, files):  # the same step again: whole already, and never away
        shutil.rmtree(partial)
        return
    commit_folder(partial, final)


def _holds(path: Path, files: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is whole and has these files."""
    try:
        if read_state(path)["files"] != files:
            return False
        for name, written in files.items():
            verify(path / name, written)
    except InputError:
        return False
    return True


def load_checkpoint(
    path: Path,
    model: nn.Module | None,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    rank: int = 0,
    size: int = 1,
) -> dict[str, Any]:
    """Put the checkpoint's weights and optimizer state in place; returns its state.json.

    However many ranks wrote it: each of `size` ranks reads what it holds, and checks its share of the files.
    Raises `InputError` if a file is missing, truncated, changed since it was written, or of another model.
    """
    state = read_state(path)
    for name, written in list(state["files"].items())[rank::size]:
        verify(path / name, written)
    if model is not None:
        held = dict(model.state_dict())
        model.load_state_dict(_fitting(path, Stored(path, state, "model").like(held), model))
    optimizers = list(optimizers)
    if optimizers:
        held = {
            n: p
            for i, o in enumerate(optimizers)
            for g, names in zip(o.param_groups, group_names(o, i), strict=True)
            for n, p in zip(names, g["params"], strict=True)
        }
        tensors = Stored(path, state, "optimizer").like(held)
        if len(state["optimizers"]) != len(optimizers):
            raise InputError("checkpoint.foreign", path=path, what="optimizers")
        for i, (optimizer, groups) in enumerate(zip(optimizers, state["optimizers"], strict=True)):
            restore_optimizer(path, optimizer, groups, tensors, i)
    return state


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json. Raises `InputError` if it is missing or not one."""
    file = path / "state.json"
    try:
        state = parse_json(file.read_text(encoding="utf-8"))
        whole = isinstance(state, dict) and state.pop("sha256", None) == digest(state) and "format" in state
    except OSError as error:
        raise InputError("checkpoint.missing", path=file, reason=error.strerror) from None
    except ValueError:  # not JSON, not UTF-8
        whole, state = False, {}
    if not whole:
        raise InputError("checkpoint.torn", path=file)
    if state["format"] not in (FORMAT, IN_PARTS):
        raise InputError("checkpoint.format", path=path, found=state["format"], known=f"{FORMAT}, {IN_PARTS}")
    try:
        require_state(state)
    except ValueError as error:
        raise InputError("checkpoint.malformed", path=file, what=error) from None
    return state


def flatten(optimizers: Iterable[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], list[Any]]:
    """The optimizers' tensors by "<weight's name>.<key>", and their groups as JSON takes them."""
    tensors: dict[str, Tensor] = {}
    described = []
    for number, optimizer in enumerate(optimizers):
        groups = []
        for group, names in zip(optimizer.param_groups, group_names(optimizer, number), strict=True):
            numbers: dict[str, dict[str, Any]] = {}
            for name, parameter in zip(names, group["params"], strict=True):
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        tensors[f"{name}.{key}"] = value
                    elif value is not None:
                        numbers.setdefault(name, {})[key] = value
            options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            groups.append({"param_names": names, "options": options, "state": numbers})
        described.append(groups)
    return tensors, described


def restore_optimizer(
    path: Path,
    optimizer: torch.optim.Optimizer,
    groups: list[Any],
    tensors: dict[str, Tensor],
    number: int = 0,
) -> None:
    """Put back what `flatten` gave of optimizer `number`. Raises `InputError` if it is another model's."""
    if [g["param_names"] for g in groups] != group_names(optimizer, number):
        raise InputError("checkpoint.foreign", path=path, what="optimizer.param_groups")
    by_name: dict[str, dict[str, Any]] = {}
    owned = {name for group in groups for name in group["param_names"]}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition(".")
        if name in owned:
            # Cloned: in the file it begins at any address, and sums over it then differ in their last bits.
            by_name.setdefault(name, {})[field] = tensor.clone()
    state, param_groups, index = {}, [], 0
    for saved, group in zip(groups, optimizer.param_groups, strict=True):
        options = {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved["options"].items()}
        members = []
        for name, parameter in zip(saved["param_names"], group["params"], strict=True):
            entry = {**by_name.get(name, {}), **saved["state"].get(name, {})}
            for field, value in entry.items():
                if not _fits_state(value, parameter):
                    raise InputError("checkpoint.foreign", path=path, what=f"{name}.{field}")
            if entry:
                state[index] = entry
            members.append(index)
            index += 1
        named = {"param_names": saved["param_names"]} if "param_names" in group else {}
        param_groups.append({**options, "params": members, **named})
    optimizer.load_state_dict({"state": state, "param_groups": param_groups})


def require_weights(path: Path, state: Mapping[str, Any], config: TransformerConfig) -> None:
    """Raise `InputError` unless the checkpoint holds this model's weights: nothing is made for a model
    larger than its files."""
    shapes = Stored(path, state, "model").shapes()
    # First the number of layers: the list of its weights has to be made for the rest.
    if config.num_layers > len(shapes) or shapes.keys() != config.weight_shapes().keys():
        raise InputError("checkpoint.foreign", path=path, what="model")
    for name, shape in config.weight_shapes().items():
        if tuple(shapes[name]) != shape:
            raise InputError("checkpoint.foreign", path=path, what=name)


def _fitting(path: Path, weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    wanted = model.state_dict()
    for name in wanted.keys() ^ weights.keys():
        raise InputError("checkpoint.foreign", path=path, what=name)
    for name, weight in weights.items():
        if weight.shape != wanted[name].shape:
            raise InputError("checkpoint.foreign", path=path, what=f"{name} {tuple(weight.shape)}")
    return weights


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file and wait until it is on the disk."""
    path.touch()
    mode = path.stat().st_mode  # safetensors replaces the file by one that only its owner may read
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(mode)
    sync_file(path)


def digest(state: Mapping[str, Any]) -> str:
    """SHA-256 of a state's content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def fingerprint(path: Path) -> dict[str, Any]:
    """A file's size and SHA-256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def verify(path: Path, written: Mapping[str, Any]) -> None:
    """Raise `InputError` if a file is missing or not what was written."""
    try:
        found = fingerprint(path)
    except OSError as error:
        raise InputError("checkpoint.missing", path=path, reason=error.strerror) from None
    if found != written:
        raise InputError("checkpoint.torn", path=path)


def reason_of(error: Exception) -> str:
    """What the system says of an error with a file."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return os.strerror(errno.ENOSPC)
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _fits_state(value: Any, parameter: Tensor) -> bool:
    """A moment has its weight's shape and a kind that it can be added to; a count is one number."""
    if not isinstance(value, Tensor):
        return True
    return value.dtype.is_floating_point and value.shape in (parameter.shape, torch.Size([]))
