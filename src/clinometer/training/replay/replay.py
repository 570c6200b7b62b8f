"""Any step of a run again, bit for bit, with everything about it kept.

A run continues from a checkpoint with the bits it would have had, so a step that is long past can be taken
once more: the newest checkpoint before it (or the run's beginning) is restored, the steps in between are
taken by the training loop's own function, and each loss and gradient norm must be the recorded one. The step
after it, if it was recorded, vouches for the weights that the step left. The run is read and never locked or
changed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clinometer.foreign_files import parse_json
from clinometer.messages import InputError
from clinometer.optim.clipping import gradient_norms
from clinometer.text.token_shards import find_tokens
from clinometer.text.tokenizer import Tokenizer
from clinometer.training.checkpoints import checkpoint
from clinometer.training.checkpoints.generator_state import restore_random_state
from clinometer.training.replay.by_token import by_token, piece_size
from clinometer.training.replay.replay_folder import save_replay
from clinometer.training.run.computation import (
    Computation,
    batch_of,
    first_model,
    first_optimizers,
    learning_rate,
)
from clinometer.training.run.loop import forward_backward, take_step
from clinometer.training.run.run_folder import RunFolder, describe_environment
from clinometer.training.run.run_tokens import cache_folder, encode
from clinometer.training.settings.config import RunConfig, config_from
from clinometer.training.settings.precision import Choices, choose

Progress = Callable[[str, int, int], None]
"""Called with ("restore" | "encode" | "replay", done, total)."""


class MetricsRow(NamedTuple):
    """What the run recorded of a step."""

    loss: float
    lr: float
    norm: float
    taken: bool


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first recorded number that a replay did not give."""

    step: int
    what: str
    recorded: float
    found: float

    def as_error(self, folder: RunFolder, base: int, from_start: bool) -> InputError:
        changed = _changed(folder)
        key = "explain.differs"
        if changed:
            key = "explain.differs_machine"
        elif from_start and self.step == 1:
            key = "explain.differs_start"
        values = {
            "path": folder.path,
            "base": base,
            "step": self.step,
            "what": self.what,
            "recorded": repr(self.recorded),
            "found": repr(self.found),
            "off": abs(self.found - self.recorded),
        }
        return InputError(key, **values, **({"changed": changed} if changed else {}))


def replay_step(path: Path, step: int, progress: Progress, *, inexact: bool = False) -> Path:
    """Take step `step` (1 is the first) of the run in `path` again; returns the folder that tells of it.

    Raises `InputError` for a step that was not recorded, a text or checkpoint that is not the run's, and, if
    `inexact` is not set, for a loss or norm that differs from the recorded one in any bit. If it is set, the
    folder says that the step is not the run's own, and where the two part. Of a run of several ranks the
    numbers must be close (CLOSE), for one process adds up in another order; the folder says how close.
    """
    folder = RunFolder.open(path)
    rows = recorded(folder)
    require_step(folder, rows, step)
    threads = torch.get_num_threads()
    try:
        progress("restore", 0, 1)
        computation, from_start = _restored(folder, step, progress)
        progress("restore", 1, 1)
        base = computation.step
        record = _RecordedRows(
            folder, rows, base, computation.choices, from_start=from_start, inexact=inexact
        )
        total = step - base + (step + 1 in rows)
        for done in range(step - base - 1):
            progress("replay", done, total)
            row = record.row(computation.step + 1)
            loss, norm, _ = take_step(computation, row.lr)
            record.hold(computation.step, loss, norm)
        progress("replay", step - base - 1, total)
        info, tensors, shares = _take(computation, record)
        if step + 1 in rows:
            progress("replay", total - 1, total)
            record.hold(step + 1, *forward_backward(computation))
        elif all(learning_rate(c, step) != record.row(step).lr for c in _configurations(folder)):
            found = learning_rate(folder.config, step)
            record.differs(Difference(step=step, what="lr", recorded=record.row(step).lr, found=found))
        progress("replay", total, total)
    finally:
        torch.set_num_threads(threads)
    difference = record.difference
    info |= {
        "exact": difference is None and not record.farthest,
        "ranks": record.ranks,
        "off": record.farthest,
        "differs": None if difference is None else dataclasses.asdict(difference),
        "from_step": base,
    }
    return save_replay(folder.path, step, info, tensors, shares)


def recorded(folder: RunFolder) -> dict[int, MetricsRow]:
    """The rows of metrics.jsonl by step. Raises `InputError` for a line that is not the run's own writing."""
    rows: dict[int, MetricsRow] = {}
    lines = folder.metrics_file.read_bytes().split(b"\n")[:-1] if folder.metrics_file.exists() else []
    for number, line in enumerate(lines, 1):  # a last line without its end is still being written
        try:
            told = parse_json(line)
            if "lr" in told:
                # What is not finite was written as text.
                loss, lr, norm = float(told["loss"]), float(told["lr"]), float(told["grad_norm"])
                rows[int(told["step"])] = MetricsRow(loss, lr, norm, bool(told["taken"]))
        except (ValueError, TypeError, KeyError):
            raise InputError("explain.metrics", path=folder.metrics_file, line=number) from None
    return rows


def require_step(folder: RunFolder, rows: Mapping[int, MetricsRow], step: int) -> None:
    """Raise `InputError` if the run has not recorded that step."""
    if not rows:
        raise InputError("explain.no_steps", path=folder.path)
    if not 1 <= step <= max(rows):
        raise InputError("explain.no_step", path=folder.path, step=step, last=max(rows))
    if step not in rows:
        raise InputError("explain.not_recorded", path=folder.metrics_file, step=step)


CLOSE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Relative: how near a loss or norm must come that several ranks have added up in another order."""


class _RecordedRows:
    """What the run recorded, to compare each replayed step with."""

    def __init__(
        self,
        folder: RunFolder,
        rows: dict[int, MetricsRow],
        base: int,
        choices: Choices,
        *,
        from_start: bool,
        inexact: bool,
    ) -> None:
        self._folder, self._rows, self._inexact = folder, rows, inexact
        self._choices = choices
        self.ranks = max(choices.ranks, _most_ranks(folder))
        self.farthest = 0.0
        self._base, self._from_start = base, from_start
        self.difference: Difference | None = None

    def row(self, step: int) -> MetricsRow:
        if step not in self._rows:
            raise InputError("explain.not_recorded", path=self._folder.metrics_file, step=step)
        return self._rows[step]

    def hold(self, step: int, loss: float, norm: float) -> None:
        """The replayed loss and norm of a step must be the recorded bits."""
        row = self.row(step)
        for what, is_recorded, found in (("loss", row.loss, loss), ("grad_norm", row.norm, norm)):
            if found == is_recorded or (math.isnan(found) and math.isnan(is_recorded)):
                continue
            if self.ranks > 1 and math.isfinite(found) and math.isfinite(is_recorded):
                off = abs(found - is_recorded) / max(abs(is_recorded), 1e-30)
                self.farthest = max(self.farthest, off)
                if off > CLOSE.get(self._choices.precision, 0.0):
                    self.differs(Difference(step=step, what=what, recorded=is_recorded, found=found))
            else:
                self.differs(Difference(step=step, what=what, recorded=is_recorded, found=found))

    def differs(self, difference: Difference) -> None:
        if not self._inexact:
            raise difference.as_error(self._folder, self._base, self._from_start)
        self.difference = self.difference or difference


def _restored(folder: RunFolder, step: int, progress: Progress) -> tuple[Computation, bool]:
    """The run as its newest checkpoint before `step` left it, or, and then True, as it began."""
    saved = [p for p in checkpoint.checkpoints(folder.checkpoints) if checkpoint.step_of(p) < step]
    for path in [*reversed(saved), None]:
        try:
            return _computation(folder, path, progress), path is None
        except (InputError, OSError):
            # A run that is being trained removes old checkpoints, also while they are read.
            if path is None or path.exists():
                raise
    raise AssertionError


def _computation(folder: RunFolder, path: Path | None, progress: Progress) -> Computation:
    config = folder.config
    state = checkpoint.read_state(path) if path is not None else None
    choices = _choices(folder, state)
    # Raises if this machine has no such device or no compiler.
    choose(
        device=choices.device,
        precision=choices.precision,
        compile="on" if choices.compile else "off",
        total_flops=0.0,
    )
    tokenizer = Tokenizer.load(folder.tokenizer)
    content = None if state is None or state["data"] is None else state["data"]["content"]
    where = cache_folder(folder) / "tokens"
    data = content and find_tokens(where, content, tokenizer.hash, config.data.validation_fraction)
    if not data:
        data = encode(config, folder, tokenizer, lambda done, total: progress("encode", done, total))
    seen = {"content": data.header.content_hash, "tokenizer": tokenizer.hash}
    if state is not None and state["data"] not in (None, seen):
        raise InputError("explain.text", path=folder.path, corpus=config.data.corpus)
    torch.set_num_threads(choices.threads)  # sums are split by thread: other threads, other bits
    model = first_model(config, choices, tokenizer.vocab_size)
    optimizers = first_optimizers(config, model)
    if path is not None and state is not None:
        checkpoint.load_checkpoint(path, model, optimizers if state["optimizers"] else ())
        restore_random_state(state["random"])
    return Computation(
        config=config,
        choices=choices,
        tokenizer=tokenizer,
        data=data,
        model=model,
        optimizers=optimizers,
        step=0 if state is None else state["step"],
    )


def _choices(folder: RunFolder, state: dict[str, Any] | None) -> Choices:
    """What the run computes with; before its first checkpoint that stands in environment.json."""
    try:
        told = state["choices"] if state is not None else None
        return Choices(**(told or parse_json(folder.environment_file.read_text(encoding="utf-8"))["choices"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError("explain.choices", path=folder.environment_file) from None


def _most_ranks(folder: RunFolder) -> int:
    """How many ranks have trained the run at most: it may have been resumed with another number."""
    found = 1
    for path in checkpoint.checkpoints(folder.checkpoints):
        try:
            found = max(found, int(checkpoint.read_state(path)["choices"]["ranks"]))
        except (InputError, KeyError, TypeError, ValueError):  # damaged, or from before there were ranks
            continue
    return found


def _configurations(folder: RunFolder) -> list[RunConfig]:
    """The run's configuration and those of its checkpoints: another `steps` is another learning rate."""
    found = [folder.config]
    for path in checkpoint.checkpoints(folder.checkpoints):
        try:
            found.append(config_from(checkpoint.read_state(path)["config"]))
        except (InputError, KeyError, TypeError):
            continue
    return found


def _take(
    computation: Computation, record: _RecordedRows
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """Take the next step; returns its step.json, its tensors, and each token's share of them."""
    model, config, choices = computation.model, computation.config, computation.choices
    step = computation.step + 1
    row = record.row(step)
    token_ids, targets = batch_of(computation, computation.step)
    size = piece_size(config, model.config.vocab_size)
    losses, norms, shares = by_token(model, choices, token_ids, targets, size)
    assert norms is not None
    assert shares is not None
    named = dict(model.named_parameters())
    tensors = {f"{name}.before": p.detach().clone() for name, p in named.items()}
    state, groups = checkpoint.flatten(computation.optimizers)
    tensors |= {key: value.detach().clone() for key, value in state.items()}
    total = math.nan

    def keep_gradients() -> None:
        nonlocal total
        total = float(gradient_norms(model.parameters()).total)
        for name, p in named.items():
            if p.grad is not None:
                tensors[f"{name}.grad"] = p.grad.detach().clone()

    loss, norm, taken = take_step(computation, row.lr, before_clipping=keep_gradients)
    record.hold(step, loss, norm)
    tensors |= {f"{name}.after": p.detach() for name, p in named.items()}
    loss_after = by_token(model, choices, token_ids, targets, size, gradient=False).losses
    summary = {name: _summary(name, tensors) for name in named}
    max_norm = config.optim.max_norm
    info = {
        "step": step,
        "loss": loss,
        "recorded_loss": row.loss,
        "recorded_norm": row.norm,
        "taken": taken,
        "lr": row.lr,
        "clip": min(1.0, max_norm / (total + 1e-6)) if math.isfinite(total) else 1.0,
        "max_norm": max_norm,
        "total_norm": total,
        "optimizer": " + ".join(type(o).__name__ for o in computation.optimizers),
        "names": list(named),
        "loss_before": float(losses.double().mean()),
        "loss_after": float(loss_after.double().mean()),
        "predicted": math.fsum(s.pop("predicted") for s in summary.values()),
        "tensors": summary,
        "state": {
            name: [k for k, v in o.state.get(p, {}).items() if isinstance(v, Tensor) and v.shape == p.shape]
            for name, p in named.items()
            for o in computation.optimizers
            if p in o.state
        },
        "groups": groups,
        "config": config.to_toml(),
        "model": dataclasses.asdict(model.config),
        "choices": dataclasses.asdict(choices),
        "batch": _batch(computation.tokenizer, token_ids, targets)
        | {"loss": losses.tolist(), "grad_norm": norms.tolist()},
    }
    return info, tensors, shares


def _summary(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    before, after = tensors[f"{name}.before"].double(), tensors[f"{name}.after"].double()
    grad = tensors[f"{name}.grad"].double() if f"{name}.grad" in tensors else None
    return {
        "shape": list(before.shape),
        "grad_norm": math.nan if grad is None else float(torch.linalg.vector_norm(grad)),
        "weight_norm": float(torch.linalg.vector_norm(after)),
        "update_norm": float(torch.linalg.vector_norm(after - before)),
        "predicted": 0.0 if grad is None else float((grad * (after - before)).sum()),
    }


def _batch(tokenizer: Tokenizer, token_ids: Tensor, targets: Tensor) -> dict[str, Any]:
    ids, wanted = token_ids.tolist(), targets.tolist()
    piece = {i: tokenizer.decode([i]) for row in [*ids, *wanted] for i in row}
    return {
        "token_ids": ids,
        "targets": wanted,
        "pieces": [[piece[i] for i in row] for row in ids],
        "target_pieces": [[piece[i] for i in row] for row in wanted],
    }


def _changed(folder: RunFolder) -> str:
    """What of the machine and the versions is other than when the run began, as far as bits depend on it."""
    try:
        before = parse_json(folder.environment_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    now = describe_environment()
    pairs = [("processor", before.get("processor"), now["processor"])]
    for package in ("torch", "clinometer"):
        pairs.append((package, before.get("packages", {}).get(package), now["packages"][package]))
    return ", ".join(f"{what} {old} → {new}" for what, old, new in pairs if old != new)
