"""Custom autograd Functions, reentrant checkpoints, and operators of torch.library."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd import Function

from clinometer.torch_internals.look_up import look_up

BackwardNode = look_up("autograd.function.BackwardCFunction", "functions")
"""The class of the nodes that custom Functions leave in a graph."""
BACKWARD_CALLS = tuple(n for n in ("apply", "apply_jvp", "apply_boxed") if n in vars(BackwardNode or object))
without_modes: Any = look_up("_C.DisableTorchFunction", "checkpoints") or nullcontext
"""Inside, no TorchFunctionMode sees a call."""
CheckpointFunction = look_up("utils.checkpoint.CheckpointFunction", "checkpoints")
"""The Function of reentrant checkpoints; None if there is no way into one: then it is like any other."""
if without_modes is nullcontext:
    CheckpointFunction = None
look_up("autograd.Function._backward_cls._forward_cls", "functions")
transforms_active: Callable[[], bool] = look_up("_C._are_functorch_transforms_active", "transforms") or bool
"""Whether a transform of torch.func (vmap, grad) is running."""


Operator: Any = type(torch.ops.aten.add.Tensor)
"""The class of one overload of an operator: torch.ops.aten.add.Tensor."""
OperatorPacket: Any = type(torch.ops.aten.add)
"""The class of an operator with all its overloads: torch.ops.aten.add."""
_library = look_up("_library.autograd", "operators")


def function_of(node: Any) -> Any:
    """The custom autograd Function that a node belongs to; None for an operation of torch's own."""
    return getattr(type(node), "_forward_cls", None)


_ModuleHooks = look_up("nn.modules._functions.BackwardHookFunction")


def carries_module_hooks(kind: Any) -> bool:
    """Whether a Function is torch's own, which full backward hooks of modules stand on."""
    return kind is not None and kind is _ModuleHooks


def has_setup_context(kind: Any) -> bool:
    """Whether a Function's forward gets no ctx."""
    return kind.setup_context != Function.setup_context


def registered_backward(node: Any) -> tuple[Any, Any] | None:
    """The operator of torch.library that a node belongs to, and its registered backward; None for others."""
    kind = function_of(node)
    if kind is None or kind.__module__ != getattr(_library, "__name__", ""):
        return None
    held = [cell.cell_contents for cell in getattr(kind.backward, "__closure__", None) or ()]
    operator = next((value for value in held if isinstance(value, Operator)), None)
    backward = next((b for value in held if (b := getattr(value, "_backward_fn", None))), None)
    return (operator, backward) if operator is not None and backward is not None else None


def operator_name(operator: Any) -> str:
    """ "namespace::name" of an operator or of one of its overloads."""
    overload = operator if isinstance(operator, Operator) else getattr(operator, operator.overloads()[0])
    namespace, _, name = overload.name().partition("::")
    return f"{namespace}::{name.partition('.')[0]}"


def argument_names(operator: Any) -> list[str]:
    """What an operator calls its arguments."""
    schema = getattr(getattr(operator, "default", operator), "_schema", None)
    return [] if schema is None else [argument.name for argument in schema.arguments]
