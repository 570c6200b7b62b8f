"""The gradients of the full batch and of its parts, compared: equal, one factor, or one weight a part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clinometer.gradients.check.numerics.float64 import InDouble
from clinometer.gradients.check.numerics.perturbation import backward
from clinometer.gradients.sandbox.closure import Closure, evaluate
from clinometer.gradients.sandbox.sandbox import Before
from clinometer.torch_internals.modules import BatchNorm, Dropout

RELATIVE = 1e-9
FLOOR = 1e-13
"""Of the whole gradient: a tensor whose gradient cancels to rounding has no relative error."""
_BUCKETS = 32

Cause = Literal["", "factor", "weights", "some-tensors", "batch-norm", "not-a-sum"]


@dataclass(frozen=True)
class TensorSum:
    """One tensor: the sum of the parts' gradients against the full batch's."""

    name: str
    passed: bool
    factor: float
    """⟨Σ parts, full⟩ / ‖full‖²; 1 when they are equal."""
    difference: float
    """‖Σ parts − full‖ / ‖full‖."""
    only_scaled: bool
    """Whether the sum is `factor` times the full gradient in every entry."""


@dataclass
class Runs:
    tensors: Mapping[str, Tensor]
    full: Closure
    parts: Sequence[Closure]
    before: Before
    mode: InDouble
    modules: Sequence[nn.Module]
    drew: bool = False
    normalised: bool = False

    def compare(self, batch_norm: bool) -> Sums:
        """Full and parts, without dropout; with running instead of batch statistics if asked."""
        sums = Sums(self.tensors)
        loss, grads = self._run(self.full, batch_norm)
        sums.add_full(loss, grads)
        for part in self.parts:
            loss, grads = self._run(part, batch_norm)
            sums.add_part(loss, grads)
        return sums

    def _run(self, closure: Closure, batch_norm: bool) -> tuple[float, dict[str, Tensor | None]]:
        self.before.rewind()
        with _without_dropout(self.modules, batch_norm) as quiet, self.mode, quiet:
            loss = evaluate(closure)
            found = backward(loss, self.tensors, lambda: evaluate(closure))
        self.drew |= quiet.drew
        self.normalised |= quiet.normalised
        return float(loss.detach()), found


class Sums:
    """The full gradient, the running sum of the parts, and a linear sketch of each part.

    The sketch of a tensor is 32 sums of its entries times fixed Gaussian numbers: enough to fit one weight
    a part without keeping every part's gradient.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._full: dict[str, Tensor | None] = {}
        self._sum: dict[str, Tensor] = {}
        self._sizes: dict[str, float] = dict.fromkeys(tensors, 0.0)
        self._full_sketch = torch.zeros(0)
        self._sketches: list[Tensor] = []
        self.full_loss = self.parts_loss = 0.0

    def add_full(self, loss: float, grads: dict[str, Tensor | None]) -> None:
        self.full_loss, self._full = loss, grads
        self._full_sketch = self._sketch(grads)
        self._grow(grads)

    def add_part(self, loss: float, grads: dict[str, Tensor | None]) -> None:
        self.parts_loss += loss
        self._sketches.append(self._sketch(grads))
        self._grow(grads)
        for name, grad in grads.items():
            if grad is not None:
                self._sum[name] = grad if name not in self._sum else self._sum[name].add_(grad)

    def _grow(self, grads: Mapping[str, Tensor | None]) -> None:
        for name, grad in grads.items():
            if grad is not None:
                self._sizes[name] += float(torch.linalg.vector_norm(grad))

    def tensors(self) -> dict[str, TensorSum]:
        whole = sum(size**2 for size in self._sizes.values()) ** 0.5
        found = {}
        for name in self._shapes:
            full, total = self._full.get(name), self._sum.get(name)
            allowed = RELATIVE * self._sizes[name] + FLOOR * whole
            full = torch.zeros(()) if full is None else full
            total = torch.zeros(()) if total is None else total
            square = float(torch.linalg.vector_norm(full)) ** 2
            difference = float(torch.linalg.vector_norm(total - full))
            factor = float((full.conj() * total).real.sum()) / square if square > allowed**2 else 1.0
            left = float(torch.linalg.vector_norm(total - factor * full))
            scale = square**0.5
            found[name] = TensorSum(
                name,
                difference <= allowed,
                factor if difference > allowed else 1.0,
                difference / scale if scale > allowed else 0.0 if difference <= allowed else float("inf"),
                left <= allowed * max(1.0, abs(factor)),
            )
        return found

    def explain(self) -> tuple[Cause, float | None, list[float] | None]:
        tensors = self.tensors()
        wrong = [t for t in tensors.values() if not t.passed]
        if not wrong:
            return "", None, None
        # Where a tensor has no gradient at all, every factor fits it.
        measured = [t for t in tensors.values() if t.factor != 1.0 or t.difference > 0]
        factor = wrong[0].factor
        if all(t.only_scaled and abs(t.factor - factor) <= 1e-6 * abs(factor) for t in measured):
            return "factor", factor, None
        weights = self._weights()
        if weights is not None:
            # Equal but for the rounding of a closure that keeps a part in float32: one factor after all.
            if max(weights) - min(weights) <= 1e-6 * min(map(abs, weights)):
                return "factor", 1 / weights[0], None
            return "weights", None, weights
        return ("some-tensors" if len(wrong) < len(tensors) else "not-a-sum"), None, None

    def _weights(self) -> list[float] | None:
        """w with Σ w_k part_k = full, if there is one and only one."""
        parts = torch.stack(self._sketches, 1)
        if parts.shape[0] <= parts.shape[1]:
            return None
        lengths = torch.linalg.vector_norm(parts, dim=0)
        if not bool((lengths > 0).all()):
            return None
        solved = torch.linalg.lstsq(parts / lengths, self._full_sketch[:, None], driver="gelsd")
        left = torch.linalg.vector_norm(parts / lengths @ solved.solution[:, 0] - self._full_sketch)
        if int(solved.rank) < parts.shape[1] or float(left) > 1e-8 * float(self._full_sketch.norm()):
            return None
        return (solved.solution[:, 0] / lengths).tolist()

    def _sketch(self, grads: Mapping[str, Tensor | None]) -> Tensor:
        pieces = []
        for position, name in enumerate(self._shapes):
            grad = grads.get(name)
            count = self._shapes[name].numel()
            buckets = min(_BUCKETS, count)
            if grad is None or not count:
                pieces.append(torch.zeros(buckets, dtype=torch.float64))
                continue
            values = grad.real.reshape(-1).to("cpu", torch.float64)
            generator = torch.Generator().manual_seed(position)
            signed = values * torch.randn(count, generator=generator, dtype=torch.float64)
            pieces.append(torch.stack([part.sum() for part in signed.tensor_split(buckets)]))
        return torch.cat(pieces)


class _Quiet(TorchFunctionMode):
    """Dropout passes everything on; notes whether there was any, and batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.drew = False
        self.normalised = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            if kwargs.get("dropout_p"):
                self.drew = True
                kwargs = {**kwargs, "dropout_p": 0.0}
        elif name in _DROPOUTS:
            p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
            self.drew |= bool(training) and p > 0
            return args[0] if args else kwargs["input"]
        elif func is F.batch_norm and kwargs.get("training", args[5] if len(args) > 5 else False):
            self.normalised = True
        return func(*args, **kwargs)


_DROPOUTS = {
    f.__name__
    for f in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
} | {"dropout_"}


@contextmanager
def _without_dropout(modules: Sequence[nn.Module], batch_norm: bool) -> Iterator[_Quiet]:
    """Modules' own dropout off too, for what never reaches a mode; modes are put back by `rewind`."""
    quiet = _Quiet()
    for module in modules:
        for part in module.modules():
            if isinstance(part, Dropout) and part.training and part.p:
                quiet.drew = True
                part.training = False
            if batch_norm and isinstance(part, BatchNorm):
                part.training = False
    yield quiet
