"""Tensors: versions, views, memory, hooks, and those that are made of others."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import Tensor

from clinometer.torch_internals.look_up import look_up

_preserve_version = look_up("autograd.grad_mode._unsafe_preserve_version_counter", "versions")
version_of: Callable[[Any], int] = attrgetter("_version")
"""A number that grows with each write in place to a tensor's memory."""
base_of: Callable[[Any], Tensor | None] = attrgetter("_base")
"""The tensor that this one is a view of."""


class KeptVersion:
    """The version of a tensor as it is now, to be put back after its bits are."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._kept = None if _preserve_version is None else _preserve_version(tensor)
        self._number = version_of(tensor)

    def restore(self) -> None:
        if self._kept is not None and version_of(self._tensor) != self._number:
            self._kept.__exit__()


def memory_of(storage: Any) -> int:
    """A number that two storages share if they are the same memory."""
    number = getattr(storage, "_cdata", None)
    return storage.data_ptr() if number is None else number


def sparse_parts(tensor: Any) -> tuple[Tensor, Tensor]:
    """Indices and values of a COO tensor, as they are: they need not be coalesced."""
    return tensor._indices(), tensor._values()


def ragged_dimension(tensor: Tensor) -> int:
    """The dimension of a jagged tensor whose size differs from row to row; 1 for any other tensor."""
    return getattr(tensor, "_ragged_idx", 1)


def has_hooks(tensor: Tensor) -> bool:
    """Whether anybody registered a hook on a tensor's gradient."""
    return bool(getattr(tensor, "_backward_hooks", None))


def has_accumulation_hooks(tensor: Tensor) -> bool:
    """Whether anybody registered a hook for after the gradient was accumulated."""
    return bool(getattr(tensor, "_post_accumulate_grad_hooks", None))


def _has_flatten(tensor: Any) -> bool:
    return hasattr(tensor, "__tensor_flatten__") and hasattr(tensor, "__tensor_unflatten__")


is_wrapper: Callable[[Any], bool] = (
    look_up("utils._python_dispatch.is_traceable_wrapper_subclass") or _has_flatten
)
"""Whether a tensor is made of others: a DTensor, torchao's, a jagged one."""
