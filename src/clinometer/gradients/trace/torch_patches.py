"""Calls that a TorchFunctionMode does not see, made visible for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from clinometer.gradients.trace.function_calls import function_calls
from clinometer.torch_internals.look_up import replace


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

    def seen_apply(cls: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return function(cls, lambda: call(*args, **kwargs), args)

    def seen_make(make: Any) -> Any:
        def made_by(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
            made = make.__get__(None, cls)(cls, data, requires_grad)
            if threading.get_ident() == here:
                parameter(data, made)
            return made

        return staticmethod(made_by)

    def seen_enter(enter: Any) -> Any:
        def entering(self: Any) -> None:
            before = torch.is_grad_enabled()
            enter(self)
            if before and not torch.is_grad_enabled() and threading.get_ident() == here:
                inference(True)

        return entering

    def seen_leave(leave: Any) -> Any:
        def leaving(self: Any, *error: Any) -> None:
            before = torch.is_grad_enabled()
            leave(self, *error)
            if torch.is_grad_enabled() and not before and threading.get_ident() == here:
                inference(False)

        return leaving

    def came(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == here:
            modules.append(module)

    def went(module: nn.Module, args: Any, output: Any) -> None:
        while threading.get_ident() == here and modules and modules.pop() is not module:
            pass  # a forward that raised, caught by the user's code

    with ExitStack() as after:
        after.callback(modules.clear)
        after.callback(module_hooks.register_module_forward_pre_hook(came).remove)
        after.callback(module_hooks.register_module_forward_hook(went, always_call=True).remove)
        after.enter_context(function_calls(seen_apply))
        after.callback(replace(nn.Parameter, "__new__", seen_make))
        after.callback(replace(torch.inference_mode, "__enter__", seen_enter))
        after.callback(replace(torch.inference_mode, "__exit__", seen_leave))
        yield
