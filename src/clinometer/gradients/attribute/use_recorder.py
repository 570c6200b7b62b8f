"""Seeing every use of a parameter while a forward runs, and the gradient that comes back to it.

A TorchFunctionMode looks at each call. Calls that only move a parameter's entries about (transposes, chunks,
casts) are followed by `parameter_views`; calls that multiply it with something are its uses, which
`layer_handlers` records, one function a kind of layer. A call that is neither is noted as unseen: its share
of the gradient is the remainder.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clinometer.gradients.attribute.call_kinds import (
    ADDS,
    COPIES,
    JOINS,
    LOOKS,
    OPENED,
    VIEWS,
    name_of,
    needs_grad,
    open_up,
)
from clinometer.gradients.attribute.contraction import LookupUse, Use
from clinometer.gradients.attribute.layer_handlers import (
    HANDLER_OF,
    OPENER_OF,
    Call,
    record_penalty,
    record_rows,
)
from clinometer.gradients.attribute.parameter_functions import PURE
from clinometer.gradients.attribute.parameter_views import ParameterViews, is_parametrizing
from clinometer.gradients.attribute.partial_uses import StepwiseUse, split_shared_lookups, widen_lookup
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
        self._known = ParameterViews(tensors)
        self._looked: dict[int, tuple[Tensor, LookupUse]] = {}
        self._wider: dict[Use, list[LookupUse]] = {}
        self._handles: list[Any] = []

    def uses_of(self, name: str) -> list[Use]:
        """The uses of one tensor, after the backward."""
        return split_shared_lookups(self.uses[name], self._wider)

    def end_in(self, loss: Tensor) -> None:
        """A loss made of parameters alone, or a penalty added to it, is a use that has no positions."""
        if loss in self._known:
            record_penalty(self._call("penalty", loss, (), {}, shown=loss, result=loss))

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
                return open_up(func)(*args, **kwargs)
        known = [t for t in tensors_in(args, kwargs) if t in self._known]
        if not known and name in ADDS and self._looked:
            return self._widen(args, func(*args, **kwargs))
        if not known or name in LOOKS:
            return func(*args, **kwargs)
        if (opener := OPENER_OF.get(name)) is not None:
            with self:
                opened = opener(func, args, kwargs, self._gathering)
            if opened is not None:
                return opened
        out = func(*args, **kwargs)
        for tensor in self._not_followed(func, name, known, args, kwargs, out=out):
            if tensor.requires_grad and needs_grad(out):
                for placement in self._known.placements(tensor):
                    self.unseen[placement.name].append((name, user_frame(sys._getframe(1))))
        return out

    def _note_ids(self, given: Any) -> None:
        if isinstance(given, Tensor) and given.dim() and not given.is_floating_point():
            self.ids = plain(given.detach()).clone()

    def _not_followed(
        self, func: Any, name: str, known: list[Tensor], args: Any, kwargs: Any, *, out: Any
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
            func, name, distinct, args, kwargs, out=out
        ):
            return ()
        if len(distinct) < len(known) or (plain(out) is out and out.is_nested):
            return known  # the same weight on both sides
        shown, given, named = out, args, kwargs
        if any(t.is_nested for t in (out, *tensors_in(args, kwargs))):
            if any(ragged_dimension(t) != 1 for t in tensors_in(args, kwargs, out)):
                return known
            shown, given = plain(out.detach()), tuple(plain(a) for a in args)
            named = {key: plain(value) for key, value in kwargs.items()}
        handler = None if shown.is_complex() else HANDLER_OF.get(name)
        rest = distinct
        if handler is not None:
            calls = [self._call(name, tensor, given, named, shown=shown, result=out) for tensor in distinct]
            rest = [call.w for call in calls if not handler(call)]
        if len(rest) == 1 and name in PURE and self._known.derive(func, name, rest, args, kwargs, out=out):
            return ()
        return rest

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
                self.uses[name][start:] = [StepwiseUse(steps[::-1] if backwards else steps, axis)]

    def _widen(self, args: Any, out: Any) -> Any:
        for tensor, use in [self._looked[id(t)] for t in tensors_in(args) if id(t) in self._looked]:
            if (wide := widen_lookup(tensor, use, out)) is not None:
                self._wider.setdefault(use, []).append(wide)
                self._hook(wide, out)
        return out

    def _view(self, func: Any, tensor: Tensor, args: Any, kwargs: Any, out: Any) -> bool:
        chosen = args[1] if len(args) > 1 else None
        if name_of(func) == "__getitem__" and isinstance(chosen, Tensor) and tensor.dim() == 2:
            if chosen.dtype not in (torch.int64, torch.int32):
                return False
            call = self._call("__getitem__", tensor, args, kwargs, shown=out, result=out)
            return record_rows(call, chosen)
        return self._known.view(func, tensor, args, kwargs, out)

    def _call(self, name: str, w: Tensor, args: Any, kwargs: Any, *, shown: Tensor, result: Tensor) -> Call:
        """A call for a handler, which sees `shown`; δ of what it records is the gradient of `result`."""
        register = partial(self._register, w, result)
        return Call(name, w, args, kwargs, shown, self._known, register)

    def _register(self, w: Tensor, result: Tensor, use: Use, scale: float = 1.0) -> None:
        self.uses[use.placement.name].append(use)
        self._hook(use, result)
        others = self._known.others(w)
        for placement in others:
            twin = copy.copy(use)
            twin.placement = replace(placement, scale=placement.scale * scale)
            self.uses[placement.name].append(twin)
            self._hook(twin, result)
        if isinstance(use, LookupUse) and use.shares is None and not others:
            self._looked[id(result)] = (result, use)

    def _hook(self, use: Use, result: Tensor) -> None:
        use.reduce = self._reduce.get(use.placement.name)

        def arrived(delta: Tensor) -> None:
            if self.armed:
                use.receive(plain(delta))

        self._handles.append(result.register_hook(arrived))


def _first(args: tuple[Any, ...]) -> Any:
    return args[0] if args else None
