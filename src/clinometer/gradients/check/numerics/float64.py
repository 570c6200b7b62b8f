"""Everything in double precision, whatever the model asks for.

Parameters become float64 in place. Inside the mode every other low-precision tensor is lifted where it is
used, and every request for a lower precision (`.float()`, `.half()`, `dtype=torch.bfloat16`) is answered
with float64. Autocast leaves float64 alone by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clinometer.gradients.sandbox.tensors import tensors_in
from clinometer.gradients.trace.torch_patches import patch
from clinometer.torch_internals.custom_functions import (
    TRANSFORMS,
    WRAP_FOR_GRAD,
    below_transform,
    is_transformed,
    without_modes,
)
from clinometer.torch_internals.tensors import is_wrapper, version_of

LIFT = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}
_CASTS = {"float": "double", "half": "double", "bfloat16": "double", "cfloat": "cdouble", "chalf": "cdouble"}
_TYPE_NAMES = {"FloatTensor", "HalfTensor", "BFloat16Tensor"}
_AS_THEY_ARE = {"__deepcopy__", "__reduce_ex__", "__set__", "backward", "grad", "register_hook", "set_"}
STATISTICS = {"batch_norm", "instance_norm"}
"""Calls that write into the running mean and variance that they are given."""
_OTHERWISE = {"__get__", "type", "view", "_grouped_mm", *_CASTS, *_AS_THEY_ARE, *STATISTICS}
"""Names of calls that are more than their arguments lifted; so are those that write into one."""
IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__"}
_PLAIN = {int, float, bool, str, type(None)}
_WORTH_KEEPING = 1 << 16


class Float64Tensors:
    """Tensors made float64 in place; their memory of before is kept beside."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        for tensor in tensors:
            self.lift(tensor)

    def lift(self, tensor: Tensor) -> None:
        if is_wrapper(tensor):
            return  # its memory is that of the tensors inside; lifted where it is used
        if tensor.dtype in LIFT and tensor.layout is torch.strided:
            # Noted first: an interruption between the two lines must not lose the old memory. A buffer that
            # was put back between two runs is lifted again; its memory of before stays the first.
            self.before.setdefault(id(tensor), (tensor, tensor.data))
            tensor.data = tensor.data.to(LIFT[tensor.dtype])

    def original(self, tensor: Tensor) -> Tensor | None:
        """The values as they were, exactly those the float64 ones are; None if it was not changed."""
        kept = self.before.get(id(tensor))
        return None if kept is None else kept[1]

    def put_back(self, tensors: Iterable[Tensor]) -> None:
        """Gives frozen ones among these their values of before: a teacher that the forward moves on."""
        with torch.no_grad(), without_modes():
            for tensor in tensors:
                original = self.original(tensor)
                if original is not None and not tensor.requires_grad:
                    tensor.data.copy_(original)

    def restore(self) -> None:
        for tensor, data in self.before.values():
            if tensor.dtype != data.dtype or tensor.data_ptr() != data.data_ptr():
                tensor.data = data


class InDouble(TorchFunctionMode):
    """Lifts every call of torch to double precision."""

    def __init__(self, kept: Callable[[Tensor], bool] | None = None) -> None:
        super().__init__()
        self._kept = kept or _no_tensor
        """Whether a tensor is put back before each run: it follows in place, so that writes reach it."""
        self.outside = Float64Tensors(())
        self.written: dict[int, Tensor] = {}
        """Tensors that calls wrote into."""
        self._lifted: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._default: list[torch.dtype] = []
        self._wrapping: list[Callable[[], None]] = []

    def __enter__(self) -> Any:
        self.raise_default()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.restore_default()

    def raise_default(self) -> None:
        """New tensors, and what grad of torch.func differentiates by, are float64 until `restore_default`."""
        self._default.append(torch.get_default_dtype())
        self._wrapping.append(patch(TRANSFORMS, WRAP_FOR_GRAD, self._wrap_for_grad))
        torch.set_default_dtype(torch.float64)

    def restore_default(self) -> None:
        torch.set_default_dtype(self._default.pop())
        self._wrapping.pop()()

    def _wrap_for_grad(self, wrap: Any, value: Any, *level: Any, **named: Any) -> Any:
        with without_modes():
            return wrap(below_transform(self._up(value), value), *level, **named)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the mode does with one call; a mode above it may ask here, which saves a dispatch."""
        name = getattr(func, "__name__", "")
        if _only_lifts(name) and "out" not in kwargs:
            lifted, named = args, kwargs
            if is_low(args):
                lifted = self._up(tuple(args))
            if kwargs and is_low(kwargs.values()):
                named = {key: self._up(value) for key, value in kwargs.items()}
            try:
                return func(*lifted, **named)
            except RuntimeError as error:
                return self._as_given(func, args, kwargs, error)
        if name == "__get__":
            found = func(*args, **kwargs)
            return LIFT.get(found, found) if isinstance(found, torch.dtype) else found
        if name in _AS_THEY_ARE or (name == "view" and any(isinstance(a, torch.dtype) for a in args)):
            return func(*args, **kwargs)
        if name in _CASTS:
            return getattr(self._up(args[0]), _CASTS[name])(*args[1:], **kwargs)
        if name == "type" and len(args) > 1:
            args = (args[0], _lifted_type(args[1]))
        for target in written(name, args, kwargs):
            self._lift_in_place(target)
        if writes(name) and args and isinstance(args[0], Tensor):
            args = (args[0], *self._up(tuple(args[1:])))
        else:
            args = self._up(tuple(args))
        kwargs = {key: self._up(value) for key, value in kwargs.items()}
        return _grouped_mm(*args, **kwargs) if name == "_grouped_mm" else func(*args, **kwargs)

    def _as_given(self, func: Any, args: Any, kwargs: Any, error: RuntimeError) -> Any:
        """A call whose constants must have the precision they have (the scales of fake quantisation)."""
        constants = [t for t in tensors_in(args, kwargs) if not t.requires_grad and t.is_floating_point()]
        if not constants or not any(t.requires_grad for t in tensors_in(args, kwargs)):
            raise error
        args, kwargs = self._down(tuple(args)), {key: self._down(value) for key, value in kwargs.items()}
        try:
            out = func(*args, **kwargs)
        except Exception:
            raise error from None
        if any(t.dtype in LIFT for t in tensors_in(out)):
            raise error
        return out

    def _down(self, value: Any) -> Any:
        """Constants in float32, what has a gradient in float64."""
        if isinstance(value, Tensor):
            if value.requires_grad:
                return self._up(value)
            return value.to(torch.float32) if value.dtype is torch.float64 else value
        return type(value)(map(self._down, value)) if type(value) in (tuple, list) else value

    def _up(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._up_tensor(value) if value.dtype in LIFT else value
        if isinstance(value, torch.dtype):
            return LIFT.get(value, value)
        if type(value) in (tuple, list):
            return type(value)(self._up(item) for item in value)
        if type(value) is dict:
            return {key: self._up(item) for key, item in value.items()}
        return value

    def _up_tensor(self, tensor: Tensor) -> Tensor:
        if is_transformed(tensor):  # what vmap and grad of torch.func hand on has no memory of its own
            return tensor.to(LIFT[tensor.dtype])
        if self._kept(tensor) and tensor.is_leaf and not is_wrapper(tensor) and not tensor.is_inference():
            self.outside.lift(tensor)
            return tensor
        if tensor.requires_grad and tensor.is_leaf and not is_wrapper(tensor):
            # The same tensor must stay the same tensor: the closure may ask for the gradient by it.
            self.outside.lift(tensor)
            return tensor
        if tensor.requires_grad or tensor.numel() < _WORTH_KEEPING or tensor.is_inference():
            return tensor.to(LIFT[tensor.dtype])
        kept = self._lifted.get(id(tensor))
        if kept is not None and kept[0] is tensor and kept[1] == version_of(tensor):
            return kept[2]
        if len(self._lifted) >= 16:
            self._lifted.clear()
        lifted = tensor.to(LIFT[tensor.dtype])
        self._lifted[id(tensor)] = (tensor, version_of(tensor), lifted)
        return lifted

    def _lift_in_place(self, tensor: Tensor) -> None:
        """A tensor from outside that the closure writes into: a low-precision one would round the loss."""
        if is_transformed(tensor):
            return
        self.written[id(tensor)] = tensor
        if tensor.dtype not in LIFT:
            return
        if tensor.grad_fn is None and not tensor.is_inference():
            self.outside.lift(tensor)


def written(name: str, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that a call writes into: its first argument, `out`, or running statistics."""
    if writes(name) and args:
        yield from tensors_in(args[0])
    elif name in STATISTICS:
        yield from tensors_in(args[1:5], [kwargs.get(key) for key in ("running_mean", "running_var")])
    yield from tensors_in(kwargs.get("out"))


def _no_tensor(tensor: Tensor) -> bool:
    return False


@cache
def _only_lifts(name: str) -> bool:
    return name not in _OTHERWISE and not writes(name)


@cache
def writes(name: str) -> bool:
    """Whether a call of this name writes into its first argument."""
    return name.endswith("_") and (name in IN_PLACE or not name.endswith("__"))


def is_low(values: Iterable[Any]) -> bool:
    """Whether any of these arguments is, or holds, what is to be lifted."""
    for value in values:
        kind = type(value)
        if kind in _PLAIN:
            continue
        if isinstance(value, Tensor):
            if value.dtype in LIFT:
                return True
        elif kind is torch.dtype:
            if value in LIFT:
                return True
        elif kind is tuple or kind is list:
            if is_low(value):
                return True
        elif kind is dict and is_low(value.values()):
            return True
    return False


@contextmanager
def in_double(
    tensors: Iterable[Tensor], kept: Callable[[Tensor], bool] | None = None
) -> Iterator[tuple[InDouble, Float64Tensors]]:
    """The mode to run in, and the tensors made float64 until the end; then all is as before."""
    mode = InDouble(kept)
    doubled = Float64Tensors(())
    try:
        with torch.no_grad():
            for tensor in tensors:
                doubled.lift(tensor)
        yield mode, doubled
    finally:
        doubled.restore()
        mode.outside.restore()


def _lifted_type(kind: Any) -> Any:
    if isinstance(kind, torch.dtype):
        return LIFT.get(kind, kind)
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    return torch.float64 if name.rpartition(".")[2] in _TYPE_NAMES else kind


def _grouped_mm(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """torch._grouped_mm, which has no float64 kernel: one product a group, groups ending at `offs`."""
    if offs is None:
        return a @ b if bias is None else a @ b + bias
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    groups = list(zip(starts, ends, strict=True))
    if a.ndim == 2 and b.ndim == 3:
        parts = [a[i:j] @ b[g] for g, (i, j) in enumerate(groups)]
        # Rows after the last group belong to no one; torch leaves them undefined.
        rest = a.new_zeros(a.shape[0] - ends[-1], b.shape[-1])
        out = torch.cat([*parts, rest])
    elif a.ndim == 3:
        out = torch.cat([a[g] @ b[:, i:j] for g, (i, j) in enumerate(groups)], -1)
    else:
        out = torch.stack([a[:, i:j] @ b[i:j] for i, j in groups])
    return out if bias is None else out + bias
