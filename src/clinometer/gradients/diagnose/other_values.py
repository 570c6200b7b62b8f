"""Other values: is a gradient that is zero now zero at other values of the parameters too?

A zero is no fault if something that can move would change it: a weight of zero that gets a gradient, a
teacher that equals the student at the first step. Whether that is so is tried: the closure runs again with
other values of the parameters, the same random numbers and the same batch: first of those that have a
gradient (they move), then of those that have none, then of all; at last with other data.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from clinometer.distributed.ranks import Ranks
from clinometer.gradients.diagnose.evidence import read_clue
from clinometer.gradients.diagnose.other_data import OtherData
from clinometer.gradients.sandbox.closure import Closure, evaluate
from clinometer.gradients.sandbox.sandbox import Before
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.trace.observed_run import ObservedRun, gradients_kept, observe
from clinometer.torch_internals.tensors import is_wrapper

Outcome = Literal["moves", "minimum", "stuck", "batch", "constant", "true"]
"""What the trials showed of a gradient that is zero or of rounding size:

moves: what has a gradient changes it · minimum: other values of its own do, and none made the loss smaller ·
stuck: other values of its own do, and some made the loss smaller · batch: other data does ·
constant: it was zero at all values · true: no rounding, as it stays what it is when all values move by a
ten-thousandth.
"""
_NEAR, _FRESH = "near", "fresh"
_TRIES = ((_NEAR, 0.1), (_FRESH, 1.0), (_FRESH, 10.0))
_FAR = ((_FRESH, 1e-3), *((_FRESH, scale) for scale in (3.0, 10.0, 10.0, 30.0, 30.0)))
"""Values at which no margin is kept, or boxes meet. Terms that cancel would be lost in rounding there."""
_SMALL_MOVES = (0.01, 0.01, 0.1, 0.1, 0.3, 0.3)
_LEAST_SIZE = 0.1
"""Other values of a tensor of zeros have this size."""
_FACTORS = (1.37, 0.83)
_SAME = 0.5
_ROUNDINGS = 256
"""At other values a gradient that does not cancel is far from the rounding of its terms."""
_LOSS_ROUNDING = 64


@dataclass
class OtherValues:
    """The closure at other values; everything is put back after each run."""

    subject: Subject
    closure: Closure
    before: Before
    ranks: Ranks
    run: ObservedRun
    """The run at the values as they are."""
    still: Collection[str]
    """The names of all tensors whose gradient is missing, zero or of rounding size."""

    def __post_init__(self) -> None:
        leaves = [] if self.run.flow is None else self.run.flow.graph.leaves.values()
        reached = {id(node.variable): node.variable for node in leaves}
        known = {id(tensor): name for name, tensor in self.subject.tensors.items()}
        reached |= {id(tensor): tensor for tensor in self.subject.tensors.values()}
        self._own = {known[key]: t for key, t in reached.items() if key in known and _can_move(t)}
        self._others = [t for key, t in reached.items() if key not in known and _can_move(t)]
        self._gradients = {name: tensor.grad for name, tensor in self._own.items()}
        self._seed = 0

    def judge(self, groups: Iterable[tuple[Collection[str], bool]]) -> dict[str, Outcome]:
        """Returns what the trials show of groups of names; True for a group in whose gradients terms cancel.

        Without the names that could not be tried, as the closure cannot be run again.
        """
        found: dict[str, Outcome] = {}
        try:
            with gradients_kept(self.subject):
                for names, cancels in groups:
                    found |= self._judge_group(set(names), cancels)
        except Exception:  # a batch from an iterator, a graph used up, a value the closure does not take
            return found
        return found

    def _judge_group(self, names: set[str], cancels: bool) -> dict[str, Outcome]:
        if cancels and any(self.run.sizes[name] for name in names) and self._is_true(names):
            return _each(names, "true")
        moving = self._moving(cancels)
        found: dict[str, Outcome] = {}
        for kind, scale in _TRIES[:2] if moving else ():
            alive, _ = self._alive(names - found.keys(), moving, kind, scale)
            found |= _each(alive, "moves")
        waiting = names - found.keys()
        return found | _each(waiting, self._outcome(waiting, moving, cancels)) if waiting else found

    def _outcome(self, names: set[str], moving: list[Tensor], cancels: bool) -> Outcome:
        """What the trials show of names whose gradient stays zero when that moves which has one."""
        own = [tensor for name, tensor in self._own.items() if name in names]
        still = [tensor for name, tensor in self._own.items() if name in self.still]
        losses = []
        for kind, scale in _TRIES if cancels else _TRIES + _FAR:
            alive, loss = self._alive(names, own, kind, scale)
            losses.append(loss)
            if alive:
                return self._minimum_or_stuck(own, losses)
        for kind, scale in _TRIES[1:]:
            alive, loss = self._alive(names, [*still, *moving], kind, scale)
            losses.append(loss)
            if alive:
                return "moves" if moving else self._minimum_or_stuck(own, losses)
        with OtherData(self.subject) as other:
            alive, _ = self._alive(names, [*still, *moving], *_TRIES[0], other=other)
        return "batch" if alive else "constant"

    def _moving(self, cancels: bool) -> list[Tensor]:
        """What has a gradient. Where terms cancel, without vectors.

        A scale of ones, as a new normalisation has, that leaves the point where terms cancel lets through as
        little as it has moved.
        """
        moving = [tensor for name, tensor in self._own.items() if name not in self.still] + self._others
        return [tensor for tensor in moving if tensor.dim() > 1 or not cancels]

    def _alive(
        self,
        names: Collection[str],
        moved: Iterable[Tensor],
        kind: str,
        scale: float,
        *,
        other: OtherData | None = None,
    ) -> tuple[set[str], float]:
        """Which of the names have a gradient above rounding once these tensors are moved; and the loss."""
        if not names:
            return set(), math.nan
        with self._moved(moved, kind, scale):
            if other is not None:
                torch.manual_seed(self._seed)
            run = self._run_again(other=other)
        return {name for name in names if has_gradient(run, self.subject, name)}, float(run.loss.detach())

    def _run_again(self, factor: float = 1.0, other: OtherData | None = None) -> ObservedRun:
        def closure() -> Tensor:
            return evaluate(self.closure) * factor

        run = self.closure if factor == 1.0 else closure
        run = run if other is None else other.around(run)
        clue = partial(read_clue, roundings=_ROUNDINGS)
        return observe(self.subject, run, self.before, self.ranks, clue, roundings=_ROUNDINGS)

    def _minimum_or_stuck(self, own: Iterable[Tensor], losses: list[float]) -> Outcome:
        here = float(self.run.loss.detach())
        least = here - _LOSS_ROUNDING * torch.finfo(self.run.loss.dtype).eps * max(1.0, abs(here))
        for scale in () if here == 0 else _SMALL_MOVES:
            if any(loss < least for loss in losses):
                break
            with self._moved(own, _NEAR, scale):
                losses.append(float(evaluate(self.closure).detach()))
        return "stuck" if any(loss < least for loss in losses) else "minimum"

    def _is_true(self, names: set[str]) -> bool:
        """Whether gradients of rounding size grow with the loss and stay what they are after a small move.

        Rounding does not: the loss is multiplied by numbers that no power of two is.
        """
        ordered = sorted(names)
        then = [self._gradients.get(name) for name in ordered]
        for factor in _FACTORS:
            with self._moved([*self._own.values(), *self._others], _NEAR, 1e-4):
                self._run_again(factor)
                now = [self.subject.tensors[name].grad for name in ordered]
            if _distance(now, then, factor) > _SAME:
                return False
        return True

    @contextmanager
    def _moved(self, tensors: Iterable[Tensor], kind: str, scale: float) -> Iterator[None]:
        self._seed += 1
        self.before.rewind()
        generator = torch.Generator().manual_seed(self._seed)
        kept = [(tensor.data, tensor.data.clone()) for tensor in tensors]
        try:
            for data, values in kept:
                size = float(values.double().square().mean().sqrt())
                drawn = torch.randn(values.shape, generator=generator, dtype=torch.float32).to(values)
                if kind == _NEAR:
                    data.add_(drawn, alpha=scale * (size or _LEAST_SIZE))
                else:
                    data.copy_(drawn.mul_(scale * max(size, _LEAST_SIZE)))
            yield
        finally:
            for data, values in kept:
                data.copy_(values)


def has_gradient(run: ObservedRun, subject: Subject, name: str) -> bool:
    """Whether a tensor has a gradient in a run that is finite and not zero, and more than rounding."""
    size, tensor = run.sizes[name], subject.tensors[name]
    if not size or not math.isfinite(size):
        return False
    leaf = None if run.flow is None else run.flow.graph.leaves.get(id(tensor))
    if leaf is None or run.flow is None or tensor.grad is None:
        return True
    return leaf not in run.flow.cancelled and not run.flow.is_rounding(leaf, tensor.grad)


def _each(names: Iterable[str], outcome: Outcome) -> dict[str, Outcome]:
    return dict.fromkeys(names, outcome)


def _can_move(tensor: Tensor) -> bool:
    plain = tensor.layout is torch.strided and not is_wrapper(tensor) and not tensor.is_meta
    return tensor.is_leaf and tensor.requires_grad and tensor.is_floating_point() and plain


def _distance(now: list[Tensor | None], then: list[Tensor | None], factor: float) -> float:
    """The size of now / factor − then, relative to that of then."""
    both = [
        (a.double() / factor, b.double())
        for a, b in zip(now, then, strict=True)
        if a is not None and b is not None
    ]
    difference = sum(float((a - b).square().sum()) for a, b in both)
    size = sum(float(b.square().sum()) for _, b in both)
    return math.sqrt(difference / size) if size else math.inf
