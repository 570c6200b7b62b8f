"""A scalar that can be computed again exactly, with a few of its tensors moved by a known amount."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients.check.numerics.finite_differences import (
    EPS,
    ROUNDING,
    STEP,
    Along,
    Judgement,
    direction,
    judge,
    reals,
)
from clinometer.gradients.check.numerics.float64 import Float64Tensors, InDouble
from clinometer.gradients.check.numerics.stop_gradients import StopGradients
from clinometer.gradients.report.places import Where
from clinometer.gradients.trace.graph import Graph, operation
from clinometer.messages import InputError
from clinometer.torch_internals.nodes import run_backward

MOST_RELEASED = 8
"""Lines that are tried one by one: an evaluation each."""
_NOTICED = 1e4
"""Times the rounding of the loss: what a maximum subtracted in a softmax leaves is below."""


class NotRepeatable(Exception):
    """Two runs at the same point gave two values."""


class Probe:
    """`L(θ)`: a loss, or ⟨u, f(x)⟩ for one module, with its analytic gradient and its differences.

    `run` computes it from the beginning: same random numbers, same buffers. The probe adds double
    precision and, in every run after the first, the constants the first one recorded.
    """

    def __init__(
        self,
        run: Callable[[], Tensor],
        tensors: Mapping[str, Tensor],
        doubling: InDouble | None,
        doubled: Float64Tensors,
    ) -> None:
        self._run = run
        self._doubling = doubling or nullcontext()
        self._doubled = doubled
        self._copies: dict[str, Tensor] = {}
        self.tensors = dict(tensors)
        self.held = StopGradients(doubling)
        self.unreached: frozenset[str] = frozenset()
        """Tensors that are not in the scalar's graph: cut off from it, or not used."""
        self.here = 0.0
        self.magnitude = 0.0
        self.gradients: dict[str, Tensor | None] = {}

    def begin(self, magnitude: float | None = None, look: Callable[[Tensor], None] | None = None) -> None:
        """Compute the scalar and its gradient."""
        with self.held.record():
            loss = self._run()
        self.here = float(loss.detach())
        self.magnitude = abs(self.here) if magnitude is None else max(abs(self.here), magnitude)
        if look is not None:
            look(loss)
        found = Graph(loss).leaves if loss.grad_fn is not None else {id(loss): None}
        self.gradients = self._backward(loss)
        # A reentrant checkpoint's parameters are in no graph before its backward, and have a gradient after.
        self.unreached = frozenset(
            name for name, t in self.tensors.items() if id(t) not in found and self.gradients[name] is None
        )
        del found

    def repeat(self) -> None:
        """Compute the scalar again, its constants given; raises NotRepeatable if it is another."""
        if not self._agrees(self.value()):
            self.held.active = False
            first = self.value()
            if not (self._agrees(first) and self._agrees(self.value())):
                raise NotRepeatable

    def value(self) -> float:
        """The scalar where the tensors are now."""
        with self.held.replay():
            loss = self._run()
        return float(loss.detach())

    def depends_on(self, name: str, generator: torch.Generator) -> bool:
        """Whether the scalar, nothing held constant, is another when one tensor is moved by a small step."""
        with self._moved({name: self.direction(name, generator)}, STEP), self._doubling:
            return not self._agrees(float(self._run().detach()))

    def stopped(self, seed: int) -> list[Where]:
        """Lines whose values take part in the loss though the gradient takes them for constants.

        All tensors moved a little, does the loss notice whether the values of this line move too?
        """
        lines = list(self.held.labelled)[:MOST_RELEASED]
        if not lines:
            return []
        found, least = [], _NOTICED * ROUNDING * EPS * self.magnitude
        with self._moved(dict(self._drawn(seed)), STEP):
            fixed = self.value()
            for label in lines:
                self.held.released = label
                try:
                    live = self.value()
                except Exception:  # with another number the closure may go where it cannot
                    continue
                finally:
                    self.held.released = ""
                if abs(live - fixed) > least:
                    found.append(self.held.places[label])
        return found

    def _agrees(self, value: float) -> bool:
        return abs(value - self.here) <= ROUNDING * EPS * self.magnitude

    def _backward(self, loss: Tensor) -> dict[str, Tensor | None]:
        with self._doubling:
            return backward(loss, self.tensors, self._run)

    def gradients_again(self) -> dict[str, Tensor | None]:
        """The gradient of one more run, in the circumstances of now."""
        with self.held.replay():
            loss = self._run()
        return self._backward(loss)

    def accumulated(self) -> dict[str, Tensor | None]:
        """What one more run leaves in `.grad`: also what a hook accumulates by a backward of its own."""
        with self._doubling:
            loss = self._run()
            if loss.requires_grad:
                run_backward(loss, [], accumulate=True)
        found = {name: tensor.grad for name, tensor in self.tensors.items()}
        for tensor in self.tensors.values():
            tensor.grad = None
        return {name: None if grad is None else grad.detach() for name, grad in found.items()}

    def slope_by_gradient(self, steps: Mapping[str, Tensor]) -> tuple[float, float]:
        """`⟨g, v⟩` and `‖g⊙v‖₂`; a missing gradient counts as zero."""
        total = square = 0.0
        for name, v in steps.items():
            if (grad := self.gradients[name]) is not None:
                product = reals(grad).to(torch.float64) * v
                total += float(product.sum())
                square += float(product.square().sum())
        return total, square**0.5

    def along(self, steps: Mapping[str, Tensor]) -> Along:
        """The scalar as a function of t, at θ + t·v."""

        def at(t: float) -> float:
            with self._moved(steps, t):
                return self.value()

        return at

    def moved(self, steps: Mapping[str, Tensor], t: float, run: Callable[[], Any]) -> Any:
        """What `run` returns at θ + t·v, in the surroundings of `value`."""
        with self._moved(steps, t), self.held.replay():
            return run()

    def judge(self, steps: Mapping[str, Tensor]) -> Judgement:
        """The gradient against the differences along one direction."""
        analytic, scale = self.slope_by_gradient(steps)
        return judge(self.along(steps), analytic, scale, self.magnitude, self.here)

    def direction(self, name: str, generator: torch.Generator) -> Tensor:
        return direction(self.tensors[name], generator)

    def judge_everything(self, seed: int) -> Judgement:
        """One direction through all tensors in the graph, drawn again at each step instead of kept."""
        analytic = square = 0.0
        for name, v in self._drawn(seed):
            a, s = self.slope_by_gradient({name: v})
            analytic, square = analytic + a, square + s * s

        def at(t: float) -> float:
            try:
                for name, v in self._drawn(seed):
                    self._place(name, v, t)
                return self.value()
            finally:
                for name in self.tensors:
                    self._place(name)

        return judge(at, analytic, square**0.5, self.magnitude, self.here)

    def _drawn(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in self.tensors.items():
            if name in self.unreached:
                continue
            # From θ as it was: the direction must not depend on how far it has been followed already.
            yield name, direction(self._base(name), generator).to(tensor.device)

    @contextmanager
    def _moved(self, steps: Mapping[str, Tensor], t: float) -> Iterator[None]:
        try:
            for name, v in steps.items():
                self._place(name, v, t)
            yield
        finally:
            for name in steps:
                self._place(name)

    def _place(self, name: str, v: Tensor | None = None, t: float = 0.0) -> None:
        """θ exactly as it was, or θ + t·v; through `.data`, so no graph notices."""
        data = self.tensors[name].data
        data.copy_(self._base(name))
        if v is not None:
            reals(data).add_(v, alpha=t)

    def _base(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        original = self._doubled.original(tensor)
        if original is not None:
            return original
        if name not in self._copies:
            self._copies[name] = tensor.detach().clone()
        return self._copies[name]


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    return any(operation(node) == "CheckpointFunction" for node in Graph(loss).nodes)


def backward(
    loss: Tensor, tensors: Mapping[str, Tensor], again: Callable[[], Tensor]
) -> dict[str, Tensor | None]:
    """The gradient of each tensor, dense; nothing is accumulated.

    The engine is called directly: `torch.autograd.grad` would run with torch function modes switched off,
    and a custom backward should run in double precision too.
    """
    if not loss.requires_grad:
        return dict.fromkeys(tensors)
    found: Sequence[Tensor | None] | None = None
    try:
        found = run_backward(loss, list(tensors.values()), accumulate=False)
        if any(gradient is None for gradient in found) and _has_reentrant_checkpoint(loss):
            found = None  # tensors that nothing but the block uses are no part of the graph that is there
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise InputError("check.graph_used_up") from error
        if "heckpoint" not in str(error):
            raise
    if found is None:
        # Reentrant checkpointing works only with gradients that are accumulated. It computes the block once
        # more in here, and must do so in double precision too.
        loss = again()
        run_backward(loss, [], accumulate=True)
        found = [tensor.grad for tensor in tensors.values()]
        for tensor in tensors.values():
            tensor.grad = None
    return {
        name: None if grad is None else (grad.to_dense() if grad.is_sparse else grad).detach()
        for name, grad in zip(tensors, found, strict=True)
    }
