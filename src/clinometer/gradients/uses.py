"""Seeing every use of a parameter while a forward runs, and the gradient that comes back to it.

A TorchFunctionMode looks at each call. Calls that only move a parameter's entries about (transposes, chunks,
casts) are followed; calls that multiply it with something are its uses. A call that is neither is noted as
unseen: its share of the gradient is the remainder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clinometer.gradients.axes import Axes, einsum_axes, elementwise_axes, matmul_axes
from clinometer.gradients.calls import (
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
    is_number,
    name_of,
    needs_grad,
    opened_up,
    tensors_in,
)
from clinometer.gradients.contraction import Lookup, Placement, Product, Use
from clinometer.gradients.where import Where, user_frame


class Watched(TorchFunctionMode):
    """Inside, uses of `tensors` are collected; `uses[name]` have their δ once the backward is done."""

    def __init__(self, tensors: Mapping[str, Tensor], reduce: Mapping[str, Callable[[Use], Tensor]]) -> None:
        super().__init__()
        self.uses: dict[str, list[Use]] = {name: [] for name in tensors}
        self.unseen: dict[str, list[tuple[str, Where | None]]] = {name: [] for name in tensors}
        self.ids: Tensor | None = None
        """The first token ids looked up in an embedding."""
        self.armed = False
        self._reduce = reduce
        self._known: dict[int, tuple[Tensor, Placement]] = {
            id(tensor): (tensor, Placement(name)) for name, tensor in tensors.items()
        }
        self._whole: dict[str, Tensor] = {}
        self._handles: list[Any] = []

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
        known = [t for t in tensors_in((args, kwargs)) if id(t) in self._known]
        if not known or name in LOOKS:
            return func(*args, **kwargs)
        if name == "linear_cross_entropy":
            with self:  # without options it is a product and a cross-entropy, which can be seen
                return opened_up(func)(*args, **{**kwargs, "options": None})
        out = func(*args, **kwargs)
        if not self._follow(func, name, known, args, kwargs, out):
            for tensor in known:
                if self._known[id(tensor)][0].requires_grad and needs_grad(out):
                    placement = self._known[id(tensor)][1]
                    self.unseen[placement.name].append((name, user_frame(sys._getframe(1))))
        return out

    def _note_ids(self, given: Any) -> None:
        if isinstance(given, Tensor) and given.dim() and not given.is_floating_point():
            self.ids = given.detach().clone()

    def _follow(self, func: Any, name: str, known: list[Tensor], args: Any, kwargs: Any, out: Any) -> bool:
        if name in COPIES and isinstance(out, Tensor) and len(known) == 1:
            tensor, placement = self._known[id(known[0])]
            if out.shape == tensor.shape:
                self._know(out, placement)
                return True
            return False
        if name in VIEWS and len(known) == 1 and known[0] is _first(args):
            return self._follow_view(func, known[0], args, kwargs, out)
        if name in JOINS:
            return self._follow_join(func, args, kwargs, out)
        if not isinstance(out, Tensor):
            return False
        if not out.requires_grad:
            return True  # under no_grad: no gradient comes back
        if len(known) > 1 and len({id(t) for t in known}) != len(known):
            return False  # the same weight on both sides
        return all(self._use(name, tensor, args, kwargs, out) for tensor in known)

    def _know(self, tensor: Tensor, placement: Placement) -> None:
        if tensor.requires_grad and id(tensor) not in self._known:  # else no gradient comes back
            self._known[id(tensor)] = (tensor, placement)

    def _positions(self, tensor: Tensor) -> Tensor:
        _, placement = self._known[id(tensor)]
        if placement.positions is not None:
            return placement.positions
        if placement.name not in self._whole:
            kind = torch.int32 if tensor.numel() < 2**31 else torch.int64
            positions = torch.arange(tensor.numel(), dtype=kind, device=tensor.device)
            self._whole[placement.name] = positions.view(tensor.shape)
        return self._whole[placement.name]

    def _follow_view(self, func: Any, tensor: Tensor, args: Any, kwargs: Any, out: Any) -> bool:
        rest = list(tensors_in((args[1:], kwargs)))
        name = name_of(func)
        if name == "__getitem__" and rest and tensor.dim() == 2 and isinstance(args[1], Tensor):
            if args[1].dtype in (torch.int64, torch.int32):
                return self._lookup(tensor, args[1], out, None, name)
            return False
        placement = self._known[id(tensor)][1]
        with torch.no_grad():
            moved = func(self._positions(tensor), *args[1:], **kwargs)
        pairs = [(out, moved)] if isinstance(out, Tensor) else list(zip(out, moved, strict=True))
        for made, positions in pairs:
            self._know(made, Placement(placement.name, positions, placement.scale))
        return True

    def _follow_join(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        given = list(args[0] if args else kwargs.get("tensors", ()))
        names = {self._known[id(t)][1].name for t in given if id(t) in self._known}
        for name in names:
            parts, scales = [], set()
            for tensor in given:
                mine = id(tensor) in self._known and self._known[id(tensor)][1].name == name
                if mine:
                    parts.append(self._positions(tensor).long())
                    scales.add(self._known[id(tensor)][1].scale)
                else:
                    parts.append(torch.full(tensor.shape, -1, dtype=torch.int64, device=tensor.device))
            if len(scales) != 1 or len(names) != 1:
                return False
            with torch.no_grad():
                joined = func(parts, *args[1:], **{k: v for k, v in kwargs.items() if k != "tensors"})
            self._know(out, Placement(name, joined, scales.pop()))
        return True

    def _use(self, name: str, w: Tensor, args: Any, kwargs: Any, out: Tensor) -> bool:
        get = Arguments(args, kwargs)
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
            if get(6, "sparse") or get(5, "scale_grad_by_freq"):
                return False
            return self._lookup(w, get(0, "input"), out, get(2, "padding_idx"), name)
        if name in ("layer_norm", "rms_norm"):
            return self._norm(name, w, get, out)
        if name in ADDS or name in SUBTRACTIONS:
            return self._added(name, w, get, kwargs, out)
        if name in MULS or name in DIVISIONS:
            return self._multiplied(name, w, get, out)
        return name in NEGATIONS and self._scaled(w, out, -1.0)

    def _added(self, name: str, w: Tensor, get: Arguments, kwargs: Any, out: Tensor) -> bool:
        first = w is get(0, "input", "self")
        other = get(1, "other") if first else get(0, "input", "self")
        negative = name in SUBTRACTIONS and first == (name == "__rsub__")
        scale = (-1.0 if negative else 1.0) * (1.0 if first else float(kwargs.get("alpha", 1)))
        # 1 + w and W + BA are still the weight; x + w, of more axes, is a use.
        if out.shape == w.shape and (is_number(other) or other.dim() == w.dim() <= 2):
            return self._scaled(w, out, scale)
        return self._add(w, out, name, scale)

    def _multiplied(self, name: str, w: Tensor, get: Arguments, out: Tensor) -> bool:
        divided, first = name in DIVISIONS, w is get(0, "input", "self")
        other = get(1, "other") if first else get(0, "input", "self")
        if divided and not first:
            return False
        if is_number(other):
            return self._scaled(w, out, 1 / float(other) if divided else float(other))
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

    def _scaled(self, w: Tensor, out: Tensor, factor: float) -> bool:
        placement = self._known[id(w)][1]
        if out.shape != w.shape:
            return False
        self._know(out, Placement(placement.name, placement.positions, placement.scale * factor))
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
            return False
        mine = 0 if operands[0] is w else 1
        axes = einsum_axes(args[0], [o.dim() for o in operands], mine)
        return axes is not None and self._product(w, operands[1 - mine], axes, out, "einsum")

    def _product(
        self, w: Tensor, x: Tensor, axes: Axes | None, out: Tensor, name: str, alpha: float = 1.0
    ) -> bool:
        if axes is None or not isinstance(x, Tensor):
            return False
        kept = x.detach()
        device = out.device.type
        if torch.is_autocast_enabled(device) and kept.dtype in (torch.float32, torch.float16, torch.bfloat16):
            kept = kept.to(torch.get_autocast_dtype(device))
        return self._watch(w, out, name, axes, lambda: kept, kept, alpha)

    def _add(self, w: Tensor, out: Tensor, name: str, scale: float = 1.0) -> bool:
        return self._watch(
            w, out, name, elementwise_axes(tuple(w.shape), tuple(out.shape)), None, None, scale
        )

    def _norm(self, name: str, w: Tensor, get: Arguments, out: Tensor) -> bool:
        x, shape, weight = get(0, "input"), tuple(get(1, "normalized_shape")), get(2, "weight")
        if w is not weight:
            return self._add(w, out, name)
        kept = x.detach()
        if name == "layer_norm":
            eps = get(4, "eps")
            eps = 1e-5 if eps is None else eps
            normalised = lambda: F.layer_norm(kept.double(), shape, None, None, eps)  # noqa: E731
        else:
            eps = get(3, "eps")
            eps = torch.finfo(kept.dtype).eps if eps is None else eps
            normalised = lambda: F.rms_norm(kept.double(), shape, None, eps)  # noqa: E731
        return self._watch(w, out, name, elementwise_axes(tuple(w.shape), tuple(out.shape)), normalised)

    def _lookup(self, w: Tensor, ids: Tensor, out: Tensor, ignored: Any, name: str) -> bool:
        if w.dim() != 2 or not isinstance(ids, Tensor):
            return False
        if ignored is not None and ignored < 0:
            ignored += w.shape[0]
        rows = ids.detach().long().clone()
        if name == "__getitem__":
            rows = torch.where(rows < 0, rows + w.shape[0], rows)
        self._register(Lookup(self._known[id(w)][1], name, _caller(), rows, ignored), out)
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
        placement = self._known[id(w)][1]
        if scale != 1.0:
            placement = Placement(placement.name, placement.positions, placement.scale * float(scale))
        use = Product(placement, name, _caller(), x, axes.x if x else "", axes.w, axes.y, axes.lead, sizes)
        self._register(use, out)
        return True

    def _register(self, use: Use, out: Tensor) -> None:
        name = use.placement.name
        use.reduce = self._reduce.get(name)
        self.uses[name].append(use)

        def arrived(delta: Tensor) -> None:
            if self.armed:
                use.receive(delta)

        self._handles.append(out.register_hook(arrived))


def _first(args: tuple[Any, ...]) -> Any:
    return args[0] if args else None


def _caller() -> Where | None:
    return user_frame(sys._getframe(1))
