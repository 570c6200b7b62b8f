"""What an alert rule takes and returns: the facts of one finished step, and the trouble they show."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from clinometer.gradients.optimizers.identity import shrinks_by
from clinometer.monitoring.measure.step_row import StepRow
from clinometer.monitoring.measure.watched_tensors import Roster
from clinometer.monitoring.measure.writes_between import Write
from clinometer.vocabulary import COLUMN


@dataclass(frozen=True)
class Trouble:
    """A rule's cause shows in this step: where, and with which values for the message."""

    severity: Literal["fault", "warning", "explained"]
    tensors: tuple[int, ...] = ()
    """Indices of the tensors; empty: the loop as a whole."""
    values: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    """Names sentences of its own: `alert.{cause}.{variant}.what`."""


def indices_of(mask: np.ndarray) -> tuple[int, ...]:
    """The indices where `mask` is true."""
    return tuple(int(i) for i in np.flatnonzero(mask))


def median(values: Iterable[float]) -> float:
    """The median of finite numbers; numpy takes ten times as long for a hundred of them."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return float(ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2)


@dataclass
class Tensors:
    """What stays the same from step to step, of T tensors."""

    names: list[str]
    numel: np.ndarray
    matrix: np.ndarray
    """(T,) bool: two dimensions or more; vectors (biases, gains) live by other scales."""
    layer: np.ndarray
    """(T,) float, NaN where the name has none."""
    half: np.ndarray
    """(T,) bool: float16, whose smallest number is 6e-8."""
    kind: np.ndarray
    """(T,) int: tensors of one kind ("attn.q_proj") have the same number."""

    @classmethod
    def of(cls, roster: Roster, described: list[dict[str, Any]]) -> Tensors:
        """`described` is the list of tensors as the sinks know it."""
        watched = roster.watched[: len(described)]
        numbers: dict[str, int] = {}
        return cls(
            names=[one.name for one in watched],
            numel=np.array([one.numel for one in watched], float),
            matrix=np.array([len(one.shape) > 1 for one in watched], bool),
            half=np.array([one.dtype == "float16" for one in watched], bool),
            layer=np.array([math.nan if d["layer"] is None else d["layer"] for d in described], float),
            kind=np.array([numbers.setdefault(d["kind"], len(numbers)) for d in described], int),
        )


@dataclass
class Facts:
    """Of one step; T tensors."""

    step: int
    scalars: dict[str, float]
    statistics: np.ndarray
    """(T, number of statistics), in the order of the vocabulary."""
    tensors: Tensors
    owned: np.ndarray
    """(T,) bool: some watched optimizer holds it."""
    stepped: np.ndarray
    """(T,) bool: the optimizer that holds it had its turn."""
    learns: np.ndarray
    """(T,) bool: requires_grad."""
    moved_elsewhere: np.ndarray
    """(T,) bool: something other than a watched optimizer wrote to it once."""
    first_norm: np.ndarray
    """(T,) float: ‖θ‖ before its first step."""
    lr: np.ndarray
    """(T,) float, NaN where no optimizer holds it."""
    eps: np.ndarray
    """(T,) float, NaN where its optimizer has none."""
    shrinks: np.ndarray
    """(T,) float: the share that weight decay takes away in a step, NaN where that is not known."""
    shared: np.ndarray
    """(T,) bool: optimizers hold it and another parameter over the same memory."""
    replaced: np.ndarray
    """(T,) bool: an optimizer holds it, and the model has another tensor instead that none holds."""
    replacement: np.ndarray
    """(T,) bool: it is such another tensor."""
    rates: list[float]
    taken: bool
    scaler: bool
    clipped_while_scaled: bool
    piled_up: bool
    backwards: int
    """Backward calls since the last step that reached the tensors."""
    discarded: tuple[int, int]
    """Backwards that no step used, of how many since the last step."""
    write: Write | None
    """What something other than the optimizer wrote to the weights since its last step."""
    batch: dict[str, Any] | None

    @property
    def names(self) -> list[str]:
        return self.tensors.names

    @property
    def numel(self) -> np.ndarray:
        return self.tensors.numel

    @property
    def matrix(self) -> np.ndarray:
        return self.tensors.matrix

    def of(self, statistic: str) -> np.ndarray:
        return self.statistics[:, COLUMN[statistic]]

    @cached_property
    def grad_rms(self) -> np.ndarray:
        return self.of("grad_norm") / np.sqrt(np.maximum(self.numel, 1))

    def scalar(self, name: str) -> float:
        return self.scalars.get(name, math.nan)


def facts_of(row: StepRow, roster: Roster, known: Tensors) -> Facts:
    """The facts of a finished row."""
    watched = roster.watched[: len(row.statistics)]
    tensors = [one.ref() for one in watched]
    lr, eps, shrinks = np.full((3, len(watched)), np.nan)
    rates: list[float] = []
    owned, stepped = np.zeros(len(watched), bool), np.zeros(len(watched), bool)
    places = {id(tensor): index for index, tensor in enumerate(tensors)}
    for optimizer in roster.living():
        for group in optimizer.param_groups:
            rate = float(group.get("lr", math.nan))
            if any(p.requires_grad for p in group["params"]):
                rates.append(rate)
            mine = [index for p in group["params"] if (index := places.get(id(p))) is not None]
            lr[mine], owned[mine] = rate, True
            eps[mine] = _number(group.get("eps"))
            if (share := shrinks_by(optimizer, group)) is not None:
                shrinks[mine] = share
            stepped[mine] = id(optimizer) in row.stepped
    return Facts(
        step=row.step,
        scalars=row.scalars,
        statistics=row.statistics,
        tensors=known,
        owned=owned,
        stepped=stepped,
        learns=np.array([t is not None and t.requires_grad for t in tensors], bool),
        moved_elsewhere=np.array([one.moved_elsewhere for one in watched], bool)
        if row.moved_elsewhere is None
        else row.moved_elsewhere,
        first_norm=np.array([one.first_norm for one in watched])
        if row.first_norm is None
        else row.first_norm,
        lr=lr,
        eps=eps,
        shrinks=shrinks,
        shared=np.array([one.shared for one in watched], bool),
        replaced=np.array([one.replaced for one in watched], bool),
        replacement=np.array([one.replacement for one in watched], bool),
        rates=rates,
        taken=row.taken,
        scaler="grad_scale" in row.scalars,
        clipped_while_scaled=row.clipped_while_scaled,
        piled_up=row.piled_up,
        backwards=row.parts,
        discarded=(row.discarded, row.backwards),
        write=row.write,
        batch=row.batch,
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def longer(values: np.ndarray, size: int, fill: float = math.nan) -> np.ndarray:
    """`values` with room for `size` tensors: there may be more of them now."""
    if len(values) == size:
        return values
    return np.concatenate([values, np.full(size - len(values), fill, values.dtype)])
