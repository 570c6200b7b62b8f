"""What the gradient was told to treat as constant, held constant while the loss is differenced.

`detach()`, `no_grad`, `.item()`, comparisons and indices let values through and derivatives not. The
gradient is then that of the loss with those values fixed; so a numeric derivative is right only if they
are fixed too: they are recorded once and given again. With them a straight-through estimator, a stopped
target, a maximum taken out of a softmax, and a routing decision are differentiable like anything else.

Corners of functions that are straight on both sides (ReLU, abs, clamp) are continued along the side they
are on, `f(x₀) + f'(x₀)(x − x₀)`, and values exactly on a corner are counted.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from clinometer.gradients.check.numerics.float64 import STATISTICS, InDouble, is_low, writes, written
from clinometer.gradients.check.numerics.frequency_scaling import LOOKUPS, signature, undivided
from clinometer.gradients.report.places import Where, user_frame
from clinometer.gradients.sandbox.random_state import RandomState
from clinometer.gradients.trace.checkpointing import opened_checkpoints
from clinometer.gradients.trace.function_calls import function_calls, in_custom
from clinometer.torch_internals.custom_functions import is_transformed, transforms_active, untransformed
from clinometer.torch_internals.tensors import memory_of, version_of

_DATA = torch.Tensor.data  # pyright: ignore[reportAttributeAccessIssue]
_STRAIGHT: dict[Any, tuple[float, ...]] = {
    F.relu: (0.0,),
    torch.relu: (0.0,),
    torch.relu_: (0.0,),
    Tensor.relu: (0.0,),
    Tensor.relu_: (0.0,),
    F.relu6: (0.0, 6.0),
    F.leaky_relu: (0.0,),
    F.hardtanh: (-1.0, 1.0),
    torch.abs: (0.0,),
    Tensor.abs: (0.0,),
    Tensor.__abs__: (0.0,),
    torch.clamp: (),
    Tensor.clamp: (),
    Tensor.clamp_: (),
    torch.clip: (),
    Tensor.clip: (),
    torch.clamp_min: (),
    Tensor.clamp_min: (),
    torch.clamp_max: (),
    Tensor.clamp_max: (),
}


@dataclass
class _Alias:
    position: int
    tensor: Tensor
    version: int
    where: Where | None


class StopGradients(TorchFunctionMode):
    """Records at the first run, gives again at each later one. Enter it through `record` or `replay`.

    Every call is made in double precision if `doubling` is given, which need not be entered itself.
    """

    def __init__(self, doubling: InDouble | None = None) -> None:
        super().__init__()
        self._doubling = doubling
        self._call = _as_it_is if doubling is None else doubling.call
        self.recording = True
        self.active = True
        self.corners: dict[str, tuple[int, Where | None]] = {}
        """Functions with values exactly on a corner: how many, and the first line."""
        self.places: dict[str, Where] = {}
        """Lines that take floating-point values out of the gradient, by label."""
        self.released = ""
        """The label of the one line whose values are not given again but let live."""
        self.written: list[Where] = []
        """Lines whose alias (`.data`, `detach()`) was written to afterwards: not held, the write is real."""
        self.differentiates = False
        """Whether the closure takes derivatives itself, and goes on with them."""
        self.unseen_writes: dict[str, Where | None] = {}
        """Lines that write under no_grad into a tensor of the graph."""
        self.hold_writes = False
        self.unheld: dict[str, Where] = {}
        """Lines that take values out of the gradient inside vmap, where they cannot be held constant."""
        self._values: list[tuple[str, Any]] = []
        self._aliases: list[_Alias] = []
        self._labels: dict[int, str] = {}
        self._position = 0
        self._opened: list[ExitStack] = []

    def __enter__(self) -> Any:
        self._opened.append(ExitStack())
        self._opened[-1].enter_context(function_calls())
        self._opened[-1].enter_context(opened_checkpoints())
        if self._doubling is not None:
            self._doubling.raise_default()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._doubling is not None:
            self._doubling.restore_default()
        self._opened.pop().__exit__(*error)

    @property
    def labelled(self) -> dict[str, None]:
        """The lines that can be `released`, by label."""
        return dict.fromkeys(self._labels.values())

    def record(self) -> StopGradients:
        self.recording = True
        self._values, self._aliases, self._labels = [], [], {}
        return self

    def replay(self) -> StopGradients:
        if self.recording:
            self._settle()
        self.recording = False
        self._position = 0
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not self.active or (name == "__get__" and getattr(func, "__self__", None) is not _DATA):
            return self._call(func, args, kwargs)
        if name == "grad" and kwargs.get("create_graph"):
            self.differentiates = True
        if transforms_active():
            self.differentiates = True
            return self._transformed(func, args, kwargs)
        if _is_special(func):
            # What follows makes calls of its own.
            low = self._doubling is not None and (is_low(args) or is_low(kwargs.values()))
            with self._doubling if low else nullcontext():  # pyright: ignore[reportOptionalContextManager]
                corners = _corners(func, args, kwargs)
                if (
                    corners is not None
                    and args[0].requires_grad
                    and torch.is_grad_enabled()
                    and not in_custom()
                ):
                    return self._straight(func, args, kwargs, corners)
                if func is F.gumbel_softmax:
                    return self._gumbel(args, kwargs)
                if func in LOOKUPS and (undivided_call := undivided(func, args, kwargs)) is not None:
                    args, kwargs = (), undivided_call
                if func is F.embedding:
                    return self._embedding(args, kwargs)
        if writes(name) and _unseen(args):
            return self._write_unseen(name, func, args, kwargs)
        asked = _asks(args) or (kwargs and _asks(kwargs.values()))
        out = self._call(func, args, kwargs)
        into = writes(name) or name in STATISTICS or "out" in kwargs
        if not asked or (type(out) is Tensor and out.requires_grad and not into):
            return out
        if into and not in_custom():
            for target in written(name, args, kwargs):
                if not target.requires_grad:
                    self._hold_write(name, target)
        if writes(name) or "out" in kwargs:
            return out
        return self._hold(name, out, args)

    def _transformed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call inside vmap or grad of torch.func: what grad wraps is held, what vmap wraps is noted."""
        name, out = getattr(func, "__name__", ""), self._call(func, args, kwargs)
        cut = (
            isinstance(out, Tensor) and out.is_floating_point() and not out.requires_grad and not in_custom()
        )
        if not cut or not (_asks(args) or name in _CUTS):
            return out
        if not is_transformed(out):
            return self._exchange(name, out, ())
        if (plain := untransformed(out)) is not None:
            given = self._exchange(name, plain, ())
            return out if given is plain else given
        if name in _CUTS and (where := user_frame(sys._getframe(2), op=_written_as(name))) is not None:
            self.unheld.setdefault(where.label, where)
        return out

    def _hold(self, name: str, out: Any, args: Any) -> Any:
        if isinstance(out, Tensor):
            return out if out.requires_grad or in_custom() else self._exchange(name, out, args)
        if isinstance(out, bool | int | float | complex) or name == "tolist":
            return out if in_custom() else self._exchange(name, out, args)
        if isinstance(out, tuple | list) and any(isinstance(o, Tensor) and not o.requires_grad for o in out):
            if in_custom():
                return out
            parts = [o if getattr(o, "requires_grad", True) else self._exchange(name, o, args) for o in out]
            return _like(out, parts)
        return out

    def _embedding(self, args: Any, kwargs: Any) -> Tensor:
        """The row at `padding_idx` is read, and gets no gradient: a stopped gradient like any other."""
        if len(args) == 2 and not kwargs:
            return F.embedding(*args)
        given = signature(F.embedding).bind(*args, **kwargs).arguments
        ids, weight, padding = given["input"], given["weight"], given.get("padding_idx")
        out = F.embedding(*args, **kwargs)
        if padding is None or not weight.requires_grad:
            return out
        pads = ids == (padding if padding >= 0 else padding + weight.shape[0])
        return torch.where(pads[..., None], self._exchange("padding", out.detach(), ()), out)

    def _gumbel(self, args: Any, kwargs: Any) -> Any:
        """torch's own straight-through estimator: its detach() is inside, where no mode looks."""
        given = inspect.signature(F.gumbel_softmax).bind(*args, **kwargs)
        hard = given.arguments.pop("hard", False)
        options = {k: v for k, v in given.arguments.items() if k != "logits"}
        logits = given.arguments["logits"]
        state = RandomState()
        soft = F.gumbel_softmax(logits, hard=False, **options)
        if not hard:
            return soft
        state.restore()
        stepped = F.gumbel_softmax(logits, hard=True, **options)
        return soft + self._exchange("gumbel_softmax", (stepped - soft).detach(), ())

    def _exchange(self, name: str, out: Any, args: Any) -> Any:
        if not self.recording:
            label = self._labels.get(self._position)
            value = self._next(name, out)
            if label is not None and label == self.released:
                return out
            return value.clone() if isinstance(value, Tensor) else value
        if isinstance(out, Tensor):
            if out.is_floating_point():
                self._note(name, out, args)
            self._values.append((name, out.detach().clone()))
        else:
            if isinstance(out, float) or name == "tolist":
                self._note(name, out, ())
            self._values.append((name, out))
        return out

    def _hold_write(self, name: str, target: Tensor) -> None:
        if self.recording:
            self._values.append((name, target.detach().clone()))
        else:
            value = self._next(name, target)
            if value is not target:
                # A backward in the loss may still need what batch_norm saved: this must count as no write.
                target.data.copy_(value)

    def _write_unseen(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """A write under no_grad into a tensor of the graph: the gradient does not know of it.

        The change that it makes is noted; `hold_writes` holds it constant.
        """
        target, before = args[0], args[0].detach().clone()
        out = self._call(func, args, kwargs)
        if self.recording:
            where = user_frame(sys._getframe(2), op=name)
            self.unseen_writes.setdefault(getattr(where, "label", ""), where)
            self._values.append((name, target.detach() - before))
            return out
        change = self._next(name, target)
        if self.hold_writes and isinstance(change, Tensor) and change is not target:
            target.copy_(before + change)
        return out

    def _straight(self, func: Any, args: Any, kwargs: Any, corners: tuple[float, ...]) -> Any:
        x, name = args[0], func.__name__
        if self.recording:
            x0 = x.detach().clone()
            # Hooks of our own keep a checkpoint from counting what is saved here as the block's.
            with torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
                probe = x0.clone().requires_grad_()
                # In-place forms write into a clone, so that the leaf keeps its gradient.
                y0 = func(probe.clone(), *args[1:], **kwargs)
                (slope,) = torch.autograd.grad(y0.sum(), probe)
            count = sum(int((x0 == corner).sum()) for corner in corners)
            if count:
                known = self.corners.get(name, (0, None))
                self.corners[name] = (known[0] + count, known[1] or user_frame(sys._getframe(1)))
            self._values.append((name, (x0, y0.detach(), slope)))
            return func(*args, **kwargs)
        value = self._next(name, None)
        if value is None or value[0].shape != x.shape:
            return func(*args, **kwargs)
        x0, y0, slope = value
        y = y0 + slope * (x - x0)
        if name.endswith("_") or kwargs.get("inplace") or any(a is True for a in args[1:]):
            return x.copy_(y)
        return y

    def _next(self, name: str, otherwise: Any) -> Any:
        position = self._position
        self._position += 1
        if position >= len(self._values) or self._values[position][0] != name:
            return otherwise
        value = self._values[position][1]
        same = not isinstance(value, Tensor) or getattr(otherwise, "shape", None) == value.shape
        return value if same and value is not _PASS else otherwise

    def _note(self, name: str, out: Any, args: Any) -> None:
        where = user_frame(sys._getframe(1), op=_written_as(name))
        if where is not None:
            self.places.setdefault(where.label, where)
            if name not in _OF_TORCH:
                self._labels[len(self._values)] = where.label
        memory = _memory(out) if isinstance(out, Tensor) else None
        if memory is not None and any(isinstance(a, Tensor) and _memory(a) == memory for a in args):
            self._aliases.append(_Alias(len(self._values), out, version_of(out), where))

    def _settle(self) -> None:
        for alias in self._aliases:
            name, value = self._values[alias.position]
            # NumPy writes into the memory and moves no version.
            if version_of(alias.tensor) != alias.version or not _equal(alias.tensor.detach(), value):
                self._values[alias.position] = (name, _PASS)
                if alias.where is not None:
                    self.written.append(alias.where)
        self._aliases = []


def _written_as(name: str) -> str:
    """The name of a call as a person writes it."""
    return "data" if name == "__get__" else name


_CUTS = {"detach", "detach_", "__get__"}
_PASS = object()
_OF_TORCH = ("padding", "gumbel_softmax")
"""Values that torch itself takes out of the gradient, by its documentation."""


_SPECIAL = {*_STRAIGHT, F.gumbel_softmax, F.embedding, *LOOKUPS}


def _as_it_is(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _is_special(func: Any) -> bool:
    """Whether a call may be more than its result being held."""
    try:
        return func in _SPECIAL
    except TypeError:  # an unhashable callable
        return False


def _corners(func: Any, args: Any, kwargs: Any) -> tuple[float, ...] | None:
    found = _STRAIGHT.get(func)
    if found is None or not args or not isinstance(args[0], Tensor) or args[0].is_complex():
        return None
    if "out" in kwargs:
        return None
    bounds = [*args[1:], *(kwargs[k] for k in ("min", "max", "min_val", "max_val") if k in kwargs)]
    if any(isinstance(b, Tensor) for b in bounds):
        return None
    if found and not (func is F.hardtanh and bounds):
        return found
    return tuple(float(b) for b in bounds if isinstance(b, int | float) and not isinstance(b, bool))


def _asks(values: Iterable[Any]) -> bool:
    """Whether any tensor among these, or in what they hold, requires a gradient."""
    for value in values:
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, tuple | list):
            if _asks(value):
                return True
        elif type(value) is dict and _asks(value.values()):
            return True
    return False


def _unseen(args: Any) -> bool:
    target = args[0] if args else None
    return (
        isinstance(target, Tensor)
        and target.grad_fn is not None
        and not torch.is_grad_enabled()
        and not in_custom()
    )


def _memory(tensor: Tensor) -> int | None:
    return memory_of(tensor.untyped_storage()) if tensor.layout is torch.strided else None


def _equal(now: Tensor, before: Tensor) -> bool:
    """Whether two tensors hold the same numbers; NaN is itself."""
    return bool(((now == before) | ((now != now) & (before != before))).all())


def _like(out: Any, parts: list[Any]) -> Any:
    """The same kind of sequence; torch's named results (`.values`, `.indices`) take one tuple."""
    if type(out) in (tuple, list):
        return type(out)(parts)
    return type(out)(*parts) if hasattr(out, "_fields") else type(out)(parts)
