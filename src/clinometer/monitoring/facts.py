"""What the alerts look at: one finished step, as arrays over the tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from clinometer.monitoring.reading import Row
from clinometer.monitoring.roster import Roster
from clinometer.monitoring.statistics import STATISTICS


@dataclass
class Facts:
    """Of one step; T tensors."""

    step: int
    scalars: dict[str, float]
    statistics: np.ndarray
    """(T, 8)."""
    names: list[str]
    numel: np.ndarray
    matrix: np.ndarray
    """(T,) bool: two dimensions or more; vectors (biases, gains) live by other scales."""
    layer: np.ndarray
    """(T,) float, NaN where the name has none."""
    kind: list[str]
    owned: np.ndarray
    """(T,) bool: some watched optimizer holds it."""
    stepped: np.ndarray
    """(T,) bool: the optimizer that holds it had its turn."""
    learns: np.ndarray
    """(T,) bool: requires_grad."""
    moved_elsewhere: np.ndarray
    """(T,) bool: somebody else than a watched optimizer wrote to it once."""
    first_norm: np.ndarray
    """(T,) float: ‖θ‖ before its first step."""
    lr: np.ndarray
    """(T,) float, NaN where no optimizer holds it."""
    rates: list[float]
    taken: bool
    scaler: bool
    clipped_while_scaled: bool
    piled_up: bool
    batch: dict[str, Any] | None

    def of(self, statistic: str) -> np.ndarray:
        return self.statistics[:, STATISTICS.index(statistic)]

    @property
    def grad_rms(self) -> np.ndarray:
        return self.of("grad_norm") / np.sqrt(np.maximum(self.numel, 1))

    def scalar(self, name: str) -> float:
        return self.scalars.get(name, math.nan)


def facts_of(row: Row, roster: Roster, described: list[dict[str, Any]]) -> Facts:
    """The facts of a finished row; `described` is the list of tensors as the sinks know it."""
    watched = roster.watched[: len(row.statistics)]
    tensors = [one.ref() for one in watched]
    lr = np.full(len(watched), np.nan)
    rates: list[float] = []
    owned, stepped = np.zeros(len(watched), bool), np.zeros(len(watched), bool)
    for optimizer in roster.living():
        by_id = {id(p): float(g.get("lr", math.nan)) for g in optimizer.param_groups for p in g["params"]}
        rates += [
            float(g.get("lr", math.nan))
            for g in optimizer.param_groups
            if any(p.requires_grad for p in g["params"])
        ]
        for index, tensor in enumerate(tensors):
            if id(tensor) in by_id:
                lr[index], owned[index] = by_id[id(tensor)], True
                stepped[index] = id(optimizer) in row.stepped
    return Facts(
        step=row.step,
        scalars=row.scalars,
        statistics=row.statistics,
        names=[one.name for one in watched],
        numel=np.array([one.numel for one in watched], float),
        matrix=np.array([len(one.shape) > 1 for one in watched], bool),
        layer=np.array([math.nan if d["layer"] is None else d["layer"] for d in described[: len(watched)]]),
        kind=[d["kind"] for d in described[: len(watched)]],
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
        rates=rates,
        taken=row.taken,
        scaler="grad_scale" in row.scalars,
        clipped_while_scaled=row.clipped_while_scaled,
        piled_up=row.piled_up,
        batch=row.batch,
    )
