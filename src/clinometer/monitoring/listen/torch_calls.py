"""Where a watch listens in torch: backward, clipping, the loss scaler.

While at least one listener lives, a few functions of torch are wrapped (`torch_patches`) in ones that pass
everything through and tell the listeners. A listener must not raise (Watch guards each of its methods); what
the wrapped function raises passes through.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.amp import grad_scaler
from torch.nn.utils import clip_grad

from clinometer import clip_observers
from clinometer.gradients.trace.torch_patches import patch
from clinometer.torch_internals.kernels import CLIPPING


class Listener(Protocol):
    """What a watch hears; parameters and gradients are as they are before the call that is announced."""

    def backward_begins(self, losses: Sequence[Tensor], given: Any) -> None: ...
    def backward_failed(self) -> None: ...
    def backward_ended(self, losses: Sequence[Tensor], given: Any) -> None: ...
    def clipping(self, grads: Iterable[Tensor], total_norm: Any, max_norm: float) -> None: ...
    def clipping_values(self, grads: Iterable[Tensor], largest: float) -> None: ...
    def loss_scaled(self, scaler: Any) -> None: ...
    def unscaled(self, optimizer: Any) -> None: ...
    def scaler_steps(self, scaler: Any, optimizer: Any) -> None: ...
    def scaler_stepped(self, scaler: Any, optimizer: Any) -> None: ...


_lock = threading.RLock()
_listeners: tuple[Listener, ...] = ()
_put_back: list[Callable[[], None]] = []


def listen(listener: Listener) -> None:
    """Begin to tell `listener`."""
    global _listeners
    with _lock:
        if not _listeners:
            _wrap_all()
        _listeners = (*_listeners, listener)


def leave(listener: Listener) -> None:
    """Tell `listener` no more; torch is as it was when nobody is left."""
    global _listeners
    with _lock:
        before = len(_listeners)
        _listeners = tuple(other for other in _listeners if other is not listener)
        if before and not _listeners:
            while _put_back:
                _put_back.pop()()


def _wrap_all() -> None:
    scaler = grad_scaler.GradScaler
    for owner, name, around in (
        (torch.autograd, "backward", _backward),
        (clip_grad, CLIPPING, _clip_with_norm),
        (torch.nn.utils, "clip_grads_with_norm_", _clip_with_norm),
        (clip_grad, "clip_grad_value_", _clip_value),
        (torch.nn.utils, "clip_grad_value_", _clip_value),
        (scaler, "scale", _scale),
        (scaler, "unscale_", _unscale),
        (scaler, "step", _scaler_step),
    ):
        _put_back.append(patch(owner, name, around))
    clip_observers.observers.append(_ours_clips)
    _put_back.append(lambda: clip_observers.observers.remove(_ours_clips))


def _backward(original: Any, tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
    losses = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    for listener in _listeners:
        listener.backward_begins(losses, grad_tensors)
    if not isinstance(tensors, Tensor):
        tensors = losses  # it may have been a generator
    try:
        result = original(tensors, grad_tensors, *args, **kwargs)
    except BaseException:
        for listener in _listeners:
            listener.backward_failed()
        raise
    for listener in _listeners:
        listener.backward_ended(losses, grad_tensors)
    return result


def _clip_with_norm(
    original: Any, parameters: Any, max_norm: Any, total_norm: Any, *args: Any, **kwargs: Any
) -> Any:
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    for listener in _listeners:
        listener.clipping(grads, total_norm, float(max_norm))
    return original(parameters, max_norm, total_norm, *args, **kwargs)


def _clip_value(original: Any, parameters: Any, clip_value: Any, *args: Any, **kwargs: Any) -> Any:
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    for listener in _listeners:
        listener.clipping_values(grads, float(clip_value))
    return original(parameters, clip_value, *args, **kwargs)


def _ours_clips(grads: list[Any], total_norm: Any, max_norm: float) -> None:
    for listener in _listeners:
        listener.clipping(grads, total_norm, max_norm)


def _scale(original: Any, scaler: Any, outputs: Any) -> Any:
    result = original(scaler, outputs)
    for listener in _listeners:
        listener.loss_scaled(scaler)
    return result


def _unscale(original: Any, scaler: Any, optimizer: Any) -> Any:
    result = original(scaler, optimizer)
    for listener in _listeners:
        listener.unscaled(optimizer)
    return result


def _scaler_step(original: Any, scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    for listener in _listeners:
        listener.scaler_steps(scaler, optimizer)
    result = original(scaler, optimizer, *args, **kwargs)
    for listener in _listeners:
        listener.scaler_stepped(scaler, optimizer)
    return result
