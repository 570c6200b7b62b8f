"""Calls that a TorchFunctionMode does not see, made visible for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.nn.modules import module as module_hooks


@contextmanager
def seen_calls(
    function: Callable[[Any, Callable[[], Any], tuple[Any, ...]], Any],
    parameter: Callable[[Any, torch.Tensor], None],
    modules: list[nn.Module],
    inference: Callable[[bool], None],
) -> Iterator[None]:
    """Inside, `Function.apply`, `nn.Parameter(…)` and `inference_mode` report; `modules` is who runs now.

    The three have no hook of their own, so each is wrapped where it is defined and put back. Patches and
    global hooks are the process's; what other threads call goes through them unseen. One at a time:
    `untouched` holds the lock.
    """
    here = threading.get_ident()
    apply, make = Function.__dict__["apply"], nn.Parameter.__dict__["__new__"]
    enter = torch.inference_mode.__dict__["__enter__"]
    leave = torch.inference_mode.__dict__["__exit__"]

    def seen_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        call = apply.__get__(None, cls)
        if threading.get_ident() != here:
            return call(*args, **kwargs)
        return function(cls, lambda: call(*args, **kwargs), args)

    def seen_make(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        made = make(cls, data, requires_grad)
        if threading.get_ident() == here:
            parameter(data, made)
        return made

    def seen_enter(self: Any) -> None:
        before = torch.is_grad_enabled()
        enter(self)
        if before and not torch.is_grad_enabled() and threading.get_ident() == here:
            inference(True)

    def seen_leave(self: Any, *error: Any) -> None:
        before = torch.is_grad_enabled()
        leave(self, *error)
        if torch.is_grad_enabled() and not before and threading.get_ident() == here:
            inference(False)

    def came(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == here:
            modules.append(module)

    def went(module: nn.Module, args: Any, output: Any) -> None:
        while threading.get_ident() == here and modules and modules.pop() is not module:
            pass  # a forward that raised, caught by the user's code

    hooks = [module_hooks.register_module_forward_pre_hook(came)]
    try:
        hooks.append(module_hooks.register_module_forward_hook(went, always_call=True))
        Function.apply = classmethod(seen_apply)  # pyright: ignore[reportAttributeAccessIssue]
        nn.Parameter.__new__ = staticmethod(seen_make)
        torch.inference_mode.__enter__ = seen_enter
        torch.inference_mode.__exit__ = seen_leave  # pyright: ignore[reportAttributeAccessIssue]
        yield
    finally:
        Function.apply = apply
        nn.Parameter.__new__ = make
        torch.inference_mode.__enter__ = enter
        torch.inference_mode.__exit__ = leave
        for hook in hooks:
            hook.remove()
        modules.clear()
