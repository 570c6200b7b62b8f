"""Which circumstance makes wrong gradients right: each is tried, and what it explains is taken away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clinometer.gradients.check.circumstances import Circumstance, HooksOff
from clinometer.gradients.check.numerics.perturbation import Probe
from clinometer.gradients.report.places import Where

MOST_TRIED = 6
"""Tensors that are tried first; each costs some tens of evaluations if a circumstance is not the reason."""


@dataclass(frozen=True)
class TriedReason:
    """A circumstance without which the gradients of `names` are the derivatives of the loss."""

    key: str
    names: tuple[str, ...]
    places: tuple[Where | None, ...]
    function: str = ""
    """Of a custom Function: its name."""


def search(
    probe: Probe, names: Sequence[str], circumstances: Sequence[Circumstance], seed: int
) -> tuple[list[TriedReason], list[str]]:
    """The reasons that were found, and the names that are left."""
    found: list[TriedReason] = []
    left = list(names)
    for circumstance in circumstances:
        if not left:
            break
        try:
            right = _right_inside(probe, left, circumstance, seed)
        except Exception:  # it cannot run otherwise; then this is not what is tried
            continue
        if right:
            left = [name for name in left if name not in right]
            places = tuple(circumstance.places.values())
            function = getattr(circumstance, "name", "")
            found.append(TriedReason(circumstance.key, tuple(right), places, function))
    return found, left


def _right_inside(probe: Probe, names: Sequence[str], circumstance: Circumstance, seed: int) -> list[str]:
    if isinstance(circumstance, HooksOff):
        with circumstance.listening():
            probe.gradients_again()
        if not circumstance.places:
            return []
    with circumstance.changed():
        gradients = probe.gradients_again()
        if not circumstance.places:
            return []
        first = [name for name in names[:MOST_TRIED] if _passes(probe, name, gradients, seed)]
        rest = names[MOST_TRIED:] if first else []  # a reason that helps none of several is none
        return first + [name for name in rest if _passes(probe, name, gradients, seed)]


def _passes(probe: Probe, name: str, gradients: dict[str, Tensor | None], seed: int) -> bool:
    """Whether another gradient than the one in question is the derivative of the loss."""
    kept, probe.gradients = probe.gradients, gradients
    try:
        generator = torch.Generator().manual_seed(seed)
        return any(
            probe.judge({name: probe.direction(name, generator)}).verdict == "passed" for _ in range(2)
        )
    finally:
        probe.gradients = kept
