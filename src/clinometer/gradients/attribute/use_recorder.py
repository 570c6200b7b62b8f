"""Seeing every use of a parameter while a forward runs, and the gradient that comes back to it.

A TorchFunctionMode looks at each call. Calls that only move a parameter's entries about (transposes, chunks,
casts) are followed; calls that multiply it with something are its uses. A call that is neither is noted as
unseen: its share of the gradient is the remainder.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clinometer.gradients.attribute.axes import (
    Axes,
    contracted_axes,
    einsum_axes,
    elementwise_axes,
    matmul_axes,
)
from clinometer.gradients.attribute.call_kinds import (
    ADDS,
    COPIES,
    DIVISIONS,
    JOINS,
    LOOKS,
    MATMULS,
    MULS,
    NEGATIONS,
    OPENED,
    SUBTRACTIONS,
    VIEWS,
    Arguments,
    as_autocast_hands_it,
    is_number,
    name_of,
    needs_grad,
    normalised,
    opened_up,
)
from clinometer.gradients.attribute.contraction import LookupUse, ProductUse, Use, looked_up
from clinometer.gradients.attribute.convolution import (
    CONVOLUTIONS,
    TRANSPOSED,
    Convolution,
    bias_axes,
    convolution_of,
)
from clinometer.gradients.attribute.parameter_functions import PURE
from clinometer.gradients.attribute.parameter_views import Followed, is_parametrizing
from clinometer.gradients.attribute.partial_uses import Grouped, Steps, settled, widened
from clinometer.gradients.attribute.recurrent import CELLS, LAYERS, opened_cell, opened_layer
from clinometer.gradients.report.places import Where, user_frame
from clinometer.gradients.sandbox.tensors import plain, tensors_in
from clinometer.torch_internals.tensors import ragged_dimension


class UseRecorder(TorchFunctionMode):
    """Inside, uses of `tensors` are collected; `uses[name]` have their δ once the backward is done."""

    def __init__(self, tensors: Mapping[str, Tensor], reduce: Mapping[str, Callable[[Use], Tensor]]) -> None:
        super().__init__()
        self.uses: dict[str, list[Use]] = {name: [] for name in tensors}
        self.unseen: dict[str, list[tuple[str, Where | None]]] = {name: [] for name in tensors}
        self.ids: Tensor | None = None
        """The first token ids looked up in an embedding."""
        self.armed = False
        self._reduce = reduce
        self._known = Followed(tensors)
        self._looked: dict[int, tuple[Tensor, LookupUse]] = {}
        self._wider: dict[Use, list[LookupUse]] = {}
        self._hooked: Tensor | None = None
        self._handles: list[Any] = []

    def uses_of(self, name: str) -> list[Use]:
        """The uses of one tensor, after the backward."""
        return settled(self.uses[name], self._wider)

    def end_in(self, loss: Tensor) -> None:
        """A loss made of parameters alone, or a penalty added to it, is a use that has no positions."""
        if loss in self._known:
            self._use_whole(loss)

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if name == "embedding" and self.ids is None and len(args) > 1:
            self._note_ids(args[0])
        if name in OPENED:
            with self:
                return opened_up(func)(*args, **kwargs)
        known = [t for t in tensors_in(args, kwargs) if t in self._known]
        if not known and name in ADDS and self._looked:
            return self._widen(args, func(*args, **kwargs))
        if not known or name in LOOKS:
            return func(*args, **kwargs)
        if name in LAYERS or name in CELLS:
            with self:
                cell = name in CELLS
                opened = opened_cell(name, args) if cell else opened_layer(name, args, self._gathering)
            if opened is not None:
                return opened
        if name == "linear_cross_entropy":
            with self:  # without options it is a product and a cross-entropy, which can be seen
                return opened_up(func)(*args, **{**kwargs, "options": None})
        out = func(*args, **kwargs)
        for tensor in self._not_followed(func, name, known, args, kwargs, out):
            if tensor.requires_grad and needs_grad(out):
                for placement in self._known.placements(tensor):
                    self.unseen[placement.name].append((name, user_frame(sys._getframe(1))))
        return out

    def _note_ids(self, given: Any) -> None:
        if isinstance(given, Tensor) and given.dim() and not given.is_floating_point():
            self.ids = plain(given.detach()).clone()

    def _not_followed(
        self, func: Any, name: str, known: list[Tensor], args: Any, kwargs: Any, out: Any
    ) -> Sequence[Tensor]:
        """Those of `known` whose gradient through this call is not accounted for."""
        if name in COPIES and isinstance(out, Tensor) and len(known) == 1:
            return () if self._known.scaled(known[0], out, 1.0) else known
        if name in VIEWS and len(known) == 1 and known[0] is _first(args):
            return () if self._view(func, known[0], args, kwargs, out) else known
        if name in JOINS:
            return () if self._known.join(func, args, kwargs, out) else known
        if not isinstance(out, Tensor):
            return known
        if not out.requires_grad:
            return ()  # under no_grad: no gradient comes back
        distinct = list({id(t): t for t in known}.values())
        several = len(distinct) > 1 or len(distinct) < len(known)
        if (is_parametrizing() or (several and name in PURE)) and self._known.derive(
            func, name, distinct, args, kwargs, out
        ):
            return ()
        if len(distinct) < len(known) or (plain(out) is out and out.is_nested):
            return known  # the same weight on both sides
        self._hooked = out
        shown, given, named = out, args, kwargs
        if any(t.is_nested for t in (out, *tensors_in(args, kwargs))):
            if any(ragged_dimension(t) != 1 for t in tensors_in(args, kwargs, out)):
                return known
            shown, given = plain(out.detach()), tuple(plain(a) for a in args)
            named = {key: plain(value) for key, value in kwargs.items()}
        rest = [tensor for tensor in distinct if not self._use(name, tensor, given, named, shown)]
        if len(rest) == 1 and name in PURE and self._known.derive(func, name, rest, args, kwargs, out):
            return ()
        return rest

    def _use_whole(self, w: Tensor) -> None:
        self._hooked = w
        self._watch(w, w, "penalty", Axes("", "abcdefgh"[: w.dim()], "abcdefgh"[: w.dim()], ""), None)

    @contextmanager
    def _gathering(self, weights: Sequence[Tensor | None], axis: int, backwards: bool) -> Iterator[None]:
        """Inside, the uses of these weights are the steps of one use, the last first if `backwards`."""
        names = {
            p.name for w in weights if w is not None and w in self._known for p in self._known.placements(w)
        }
        begun = {name: len(self.uses[name]) for name in names}
        yield
        for name, start in begun.items():
            steps = self.uses[name][start:]
            if steps:
                self.uses[name][start:] = [Steps(steps[::-1] if backwards else steps, axis)]

    def _widen(self, args: Any, out: Any) -> Any:
        for tensor, use in [self._looked[id(t)] for t in tensors_in(args) if id(t) in self._looked]:
            if (wide := widened(tensor, use, out)) is not None:
                self._wider.setdefault(use, []).append(wide)
                self._hooked = out
                self._hook(wide)
        return out

    def _view(self, func: Any, tensor: Tensor, args: Any, kwargs: Any, out: Any) -> bool:
        chosen = args[1] if len(args) > 1 else None
        if name_of(func) == "__getitem__" and isinstance(chosen, Tensor) and tensor.dim() == 2:
            if chosen.dtype not in (torch.int64, torch.int32):
                return False
            self._hooked = out
            return self._lookup(tensor, chosen, out, None, "__getitem__")
        return self._known.view(func, tensor, args, kwargs, out)

    def _use(self, name: str, w: Tensor, args: Any, kwargs: Any, out: Tensor) -> bool:
        get = Arguments(args, kwargs)
        if out.is_complex():
            return False
        if name in CONVOLUTIONS or name in TRANSPOSED:
            return self._convolution(name, w, get, out)
        if name in ("_grouped_mm", "grouped_mm"):
            return self._grouped(name, w, get, out)
        if name == "linear":
            x, weight, bias = get(0, "input"), get(1, "weight"), get(2, "bias")
            if w is bias:
                return self._add(w, out, name)
            return w is weight and self._product(w, x, matmul_axes(x.dim(), 2, transposed=True), out, name)
        if name in MATMULS:
            a, b = get(0, "input", "self"), get(1, "other", "mat2", "vec")
            a, b = (b, a) if name == "__rmatmul__" else (a, b)
            return self._matmul(w, a, b, out, name)
        if name in ("addmm", "baddbmm"):
            added, a, b = get(0, "input"), get(1, "mat1", "batch1"), get(2, "mat2", "batch2")
            alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
            if w is added:
                return self._add(w, out, name, beta)
            return self._matmul(w, a, b, out, name, alpha)
        if name == "einsum":
            return self._einsum(w, args, out)
        if name == "embedding":
            return self._lookup(
                w, get(0, "input"), out, get(2, "padding_idx"), name, get(5, "scale_grad_by_freq")
            )
        if name in ("layer_norm", "rms_norm"):
            return self._norm(name, w, get, out)
        if name in ADDS or name in SUBTRACTIONS:
            return self._added(name, w, get, kwargs, out)
        if name in MULS or name in DIVISIONS:
            return self._multiplied(name, w, get, out)
        return name in NEGATIONS and self._known.scaled(w, out, -1.0)

    def _added(self, name: str, w: Tensor, get: Arguments, kwargs: Any, out: Tensor) -> bool:
        first = w is get(0, "input", "self")
        other = get(1, "other") if first else get(0, "input", "self")
        negative = name in SUBTRACTIONS and first == (name == "__rsub__")
        scale = (-1.0 if negative else 1.0) * (1.0 if first else float(kwargs.get("alpha", 1)))
        # 1 + w and W + BA are still the weight; x + w, of more axes, is a use.
        if out.shape == w.shape and (is_number(other) or other.dim() == w.dim() <= 2):
            return self._known.scaled(w, out, scale)
        return self._add(w, out, name, scale)

    def _multiplied(self, name: str, w: Tensor, get: Arguments, out: Tensor) -> bool:
        divided, first = name in DIVISIONS, w is get(0, "input", "self")
        other = get(1, "other") if first else get(0, "input", "self")
        if divided and not first:
            return False
        if is_number(other):
            return self._known.scaled(w, out, 1 / float(other) if divided else float(other))
        if out.shape == w.shape and w.dim() > 1:
            return False  # a mask over the weight: its rows are no positions
        axes = elementwise_axes(tuple(w.shape), tuple(out.shape))
        x = other.detach()
        return self._watch(
            w,
            out,
            name,
            axes,
            (lambda: (1 / x.double() if divided else x).expand(out.shape)),
        )

    def _convolution(self, name: str, w: Tensor, get: Arguments, out: Tensor) -> bool:
        if w is get(2, "bias"):
            return self._watch(w, out, name, bias_axes(name, out), None)
        form = convolution_of(name, get, out) if w is get(1, "weight") else None
        if form is None:
            return False
        x = as_autocast_hands_it(get(0, "input").detach(), out)
        self._register(w, Convolution(self._known.placement(w), name, _caller(), x, **form))
        return True

    def _grouped(self, name: str, w: Tensor, get: Arguments, out: Tensor) -> bool:
        a, b, ends = get(0, "input", "mat_a"), get(1, "mat2", "mat_b"), get(2, "offs")
        if w is not b or ends is None or a.dim() != 2 or b.dim() != 3:
            return False
        self._register(w, Grouped(self._known.placement(w), name, _caller(), a.detach(), ends.tolist()))
        return True

    def _matmul(self, w: Tensor, a: Tensor, b: Tensor, out: Tensor, name: str, alpha: float = 1.0) -> bool:
        if w is b:
            return self._product(w, a, matmul_axes(a.dim(), b.dim()), out, name, alpha)
        return w is a and self._product(w, b, matmul_axes(b.dim(), a.dim(), first=True), out, name, alpha)

    def _einsum(self, w: Tensor, args: Any, out: Tensor) -> bool:
        if not isinstance(args[0], str):
            return False
        operands = list(args[1]) if len(args) == 2 and not isinstance(args[1], Tensor) else list(args[1:])
        if len(operands) != 2:
            return self._einsum_of_more(w, args[0], operands, out)
        mine = 0 if operands[0] is w else 1
        axes = einsum_axes(args[0], [o.dim() for o in operands], mine)
        return axes is not None and self._product(w, operands[1 - mine], axes, out, "einsum")

    def _einsum_of_more(self, w: Tensor, equation: str, operands: list[Tensor], out: Tensor) -> bool:
        mine = next(i for i, operand in enumerate(operands) if operand is w)
        found = contracted_axes(equation, len(operands), mine)
        if found is None:
            return False
        with torch.no_grad():
            kept = torch.einsum(found[0], *(o.detach() for i, o in enumerate(operands) if i != mine))
        return self._watch(w, out, "einsum", found[1], lambda: kept, kept)

    def _product(
        self, w: Tensor, x: Tensor, axes: Axes | None, out: Tensor, name: str, alpha: float = 1.0
    ) -> bool:
        if axes is None or not isinstance(x, Tensor):
            return False
        kept = as_autocast_hands_it(x.detach(), out)
        return self._watch(w, out, name, axes, lambda: kept, kept, alpha)

    def _add(self, w: Tensor, out: Tensor, name: str, scale: float = 1.0) -> bool:
        return self._watch(
            w, out, name, elementwise_axes(tuple(w.shape), tuple(out.shape)), None, None, scale
        )

    def _norm(self, name: str, w: Tensor, get: Arguments, out: Tensor) -> bool:
        if w is not get(2, "weight"):
            return self._add(w, out, name)
        x = normalised(name, get)
        return self._watch(w, out, name, elementwise_axes(tuple(w.shape), tuple(out.shape)), x)

    def _lookup(
        self, w: Tensor, ids: Tensor, out: Tensor, ignored: Any, name: str, by_count: Any = False
    ) -> bool:
        if w.dim() != 2 or not isinstance(ids, Tensor):
            return False
        rows, ignored, shares = looked_up(ids, w.shape[0], ignored, by_count)
        use = LookupUse(self._known.placement(w), name, _caller(), rows, ignored, shares)
        self._register(w, use)
        if self._hooked is not None and shares is None and not self._known.others(w):
            self._looked[id(self._hooked)] = (self._hooked, use)
        return True

    def _watch(
        self,
        w: Tensor,
        out: Tensor,
        name: str,
        axes: Axes | None,
        x: Callable[[], Tensor] | None,
        operand: Tensor | None = None,
        scale: float = 1.0,
    ) -> bool:
        if axes is None:
            return False
        sizes = dict(zip(axes.w, w.shape, strict=True)) | dict(zip(axes.y, out.shape, strict=True))
        if operand is not None:
            for axis, size in zip(axes.x, operand.shape, strict=True):
                if sizes.setdefault(axis, size) != size:
                    return False  # broadcast batch axes
        placement = self._known.placement(w)
        if scale != 1.0:
            placement = replace(placement, scale=placement.scale * float(scale))
        use = ProductUse(placement, name, _caller(), x, axes.x if x else "", axes.w, axes.y, axes.lead, sizes)
        self._register(w, use, float(scale))
        return True

    def _register(self, w: Tensor, use: Use, scale: float = 1.0) -> None:
        self.uses[use.placement.name].append(use)
        self._hook(use)
        for placement in self._known.others(w):
            twin = copy.copy(use)
            twin.placement = replace(placement, scale=placement.scale * scale)
            self.uses[placement.name].append(twin)
            self._hook(twin)

    def _hook(self, use: Use) -> None:
        use.reduce = self._reduce.get(use.placement.name)

        def arrived(delta: Tensor) -> None:
            if self.armed:
                use.receive(plain(delta))

        assert self._hooked is not None
        self._handles.append(self._hooked.register_hook(arrived))


def _first(args: tuple[Any, ...]) -> Any:
    return args[0] if args else None


def _caller() -> Where | None:
    return user_frame(sys._getframe(1))
