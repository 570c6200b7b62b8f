"""Tensors and containers as they were: kept bit for bit, and put back only where they differ.

Bits are compared and written through an alias of the storage as whole numbers. So NaN payloads, −0.0,
complex, quantised and 8-bit formats and inference tensors need no case of their own, and a tensor that
was not changed is not written to: a graph that the user holds stays valid.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from operator import is_
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients.sandbox.tensors import dense_parts
from clinometer.torch_internals.tensors import KeptVersion, is_wrapper, memory_of

CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


class KeptBits:
    """The stretch of a storage that a strided tensor lies in."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = tensor.untyped_storage()
        item = tensor.element_size()
        reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.start = tensor.storage_offset() * item
        self.end = self.start + ((reach + 1) * item if tensor.numel() else 0)
        self.key = (memory_of(self.storage), self.start, self.end)
        self.copy: Tensor | None = None

    def take(self) -> None:
        """Copy the bits; a storage that holds no memory just now (FSDP's freed shards) has none."""
        if self.start < self.end <= self.storage.nbytes():
            self.copy = self._alias().clone()

    def differs(self) -> bool:
        """Whether the bits in memory are other than those kept."""
        return self.copy is not None and not torch.equal(self._alias(), self.copy)

    def values(self, like: Tensor) -> Tensor | None:
        """The copy as a tensor of the shape, the strides and the dtype that `like` has."""
        if self.copy is None:
            return None
        return self.copy.view(like.dtype).as_strided(like.shape, like.stride(), 0)

    def restore(self) -> None:
        if self.copy is None:
            return
        if self.storage.nbytes() < self.end:
            self.storage.resize_(int(self.end))
        now = self._alias()
        if not torch.equal(now, self.copy):
            now.copy_(self.copy)

    def _alias(self) -> Tensor:
        size, dtype = next((n, d) for n, d in _WORDS if self.start % n == 0 and self.end % n == 0)
        alias = torch.empty(0, dtype=dtype, device=self.storage.device)
        return alias.set_(self.storage, self.start // size, ((self.end - self.start) // size,), (1,))  # pyright: ignore[reportCallIssue, reportArgumentType]


class KeptTensor:
    """One tensor: its memory, bits, version, `requires_grad`, and which `.grad` it had."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.leaf = tensor.is_leaf
        self.requires_grad = tensor.requires_grad
        self.grad = tensor.grad if has_grad(tensor) else None
        wrapper = is_wrapper(tensor) or tensor.layout is not torch.strided
        self.shell = None if wrapper else tensor.data
        self.bits = [KeptBits(part) for part in dense_parts(tensor)]
        self._version = None if tensor.is_inference() else KeptVersion(tensor)

    def restore(self) -> None:
        """The tensor is again what it was, its `.grad` aside; bits are restored by their keeper."""
        tensor = self.tensor
        if self.shell is not None and _place(tensor) != _place(self.shell):
            tensor.data = self.shell
        if self.leaf and not tensor.is_leaf:
            tensor.detach_()
        if self.leaf and tensor.requires_grad != self.requires_grad:
            tensor.requires_grad_(self.requires_grad)

    def restore_grad(self) -> None:
        if has_grad(self.tensor) and self.tensor.grad is not self.grad:
            self.tensor.grad = self.grad

    def restore_version(self) -> None:
        """The bits are those of that version, so a graph that saved it may still be used."""
        if self._version is not None:
            self._version.restore()


class KeptContainer:
    """What a dict, list, set or deque held, by identity."""

    def __init__(self, container: Any) -> None:
        self.container = container
        self.items = _items(container)
        self._values = list(container.values()) if isinstance(container, dict) else []
        self._keys = list(container)

    def restore(self) -> None:
        if self._unchanged():
            return
        self.container.clear()
        if isinstance(self.container, dict):
            self.container.update(zip(self.items[::2], self.items[1::2], strict=True))
        elif isinstance(self.container, set):
            self.container.update(self.items)
        else:
            self.container.extend(self.items)

    def _unchanged(self) -> bool:
        """Asked of every container of a model between any two runs, so without a loop in Python."""
        now = self.container
        return (
            len(now) == len(self._keys)
            and all(map(is_, now, self._keys))
            and (not self._values or all(map(is_, now.values(), self._values)))
        )


def has_grad(tensor: Tensor) -> bool:
    """Whether `.grad` may be read without a warning."""
    return tensor.is_leaf or tensor.retains_grad


def _items(container: Any) -> list[Any]:
    if isinstance(container, dict):
        return [x for pair in container.items() for x in pair]
    return list(container)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()
    return (
        memory_of(storage),
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
    )
