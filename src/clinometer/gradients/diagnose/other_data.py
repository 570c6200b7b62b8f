"""Other data: the closure with a batch of other numbers, wherever it takes the batch from."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clinometer.gradients.sandbox.closure import Closure
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.sandbox.tensors import tensors_in
from clinometer.gradients.trace.operations import kind_of
from clinometer.torch_internals.tensors import is_wrapper

_SPREAD = 0.5


class OtherData(TorchFunctionMode):
    """Inside, closures given to `around` get noise on each floating-point tensor that no call made.

    A backward, and what hooks compute in it, sees none: some versions of torch keep a mode while it runs.

    Left as they are: parameters and buffers, masks of zeros and ones, tensors with an infinite entry.
    """

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        module = subject.module
        buffers = [] if module is None else list(module.buffers())
        self._same = {id(tensor) for tensor in [*subject.tensors.values(), *buffers]}
        self._made: dict[int, weakref.ref[Tensor]] = {}
        self._noisy: dict[int, tuple[Tensor, Tensor]] = {}
        self._runs = False

    def around(self, closure: Closure) -> Closure:
        """The closure with other data."""

        def with_noise() -> Any:
            self._runs = True
            try:
                return closure()
            finally:
                self._runs = False

        return with_noise

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given: dict[str, Any] = dict(kwargs or {})
        if not self._runs:
            return func(*args, **given)
        if kind_of(func)[1] != "quiet":
            args, given = self._replaced(args), self._replaced(given)
        out = func(*args, **given)
        for tensor in tensors_in(out):
            self._made[id(tensor)] = weakref.ref(tensor)
        return out

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._other(value) if self._is_data(value) else value
        if type(value) in (tuple, list):
            return type(value)(map(self._replaced, value))
        return {key: self._replaced(each) for key, each in value.items()} if type(value) is dict else value

    def _is_data(self, tensor: Tensor) -> bool:
        learned = tensor.requires_grad or isinstance(tensor, nn.Parameter) or id(tensor) in self._same
        made = self._made.get(id(tensor))
        known = made is not None and made() is tensor
        plain = tensor.layout is torch.strided and not is_wrapper(tensor) and not tensor.is_meta
        return not learned and not known and plain and tensor.is_floating_point() and tensor.numel() > 0

    def _other(self, tensor: Tensor) -> Tensor:
        """The same tensor with noise, one and the same wherever it is used."""
        if id(tensor) not in self._noisy:
            generator = torch.Generator().manual_seed(len(self._noisy))
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            size = _SPREAD * max(1.0, float(tensor.double().square().mean().sqrt()))
            self._noisy[id(tensor)] = tensor, tensor if _is_mask(tensor) else tensor + size * noise
        return self._noisy[id(tensor)][1]


def _is_mask(tensor: Tensor) -> bool:
    """Whether a tensor consists of zeros and ones, both of them, or has an infinite entry."""
    ones, zeros = tensor == 1, tensor == 0
    binary = bool((ones | zeros).all()) and bool(ones.any()) and bool(zeros.any())
    return binary or not bool(torch.isfinite(tensor).all())
