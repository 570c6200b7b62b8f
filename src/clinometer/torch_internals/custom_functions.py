"""Custom autograd Functions, reentrant checkpoints, and operators of torch.library."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd import Function

from clinometer.torch_internals.look_up import look_up


def _never(tensor: Any) -> bool:
    return False


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
UNPACK_DUAL = "_unpack_dual"
"""The call that takes a value and its derivative of forward mode apart."""


def inside_transform(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor that a transform of torch.func wraps, with the graph it has outside; None if none does."""
    return _unwrapped(tensor) if _unwrapped is not None and is_transformed(tensor) else None


is_transformed: Callable[[Any], bool] = (
    look_up("_C._functorch.is_functorch_wrapped_tensor", "transforms") or _never
)
"""Whether a tensor is what vmap or grad of torch.func hands on: it has no memory of its own."""
TRANSFORMS = look_up("_functorch.eager_transforms")
"""The module of grad, vjp and jacrev; None if this torch keeps them elsewhere."""
WRAP_FOR_GRAD = "_wrap_tensor_for_grad"
"""Its function that each tensor goes through that a transform differentiates by."""
_is_tracked = look_up("_C._functorch.is_gradtrackingtensor") or _never
_unwrapped = look_up("_C._functorch.get_unwrapped", "transforms")


def below_transform(made: Any, value: Any) -> Any:
    """What was made of `value` inside a transform that does not wrap it yet, without its wrapper."""
    return made if made is value or not is_transformed(made) else _unwrapped(made)


def untransformed(tensor: Any) -> Any:
    """The plain tensor that grad of torch.func wraps; None inside vmap, where each sample has one."""
    while is_transformed(tensor):
        if not _is_tracked(tensor):
            return None
        tensor = _unwrapped(tensor)
    return tensor


Operator: Any = type(torch.ops.aten.add.Tensor)
"""The class of one overload of an operator: torch.ops.aten.add.Tensor."""
OperatorPacket: Any = type(torch.ops.aten.add)
"""The class of an operator with all its overloads: torch.ops.aten.add."""
_library = look_up("_library.autograd", "operators")


def function_of(node: Any) -> Any:
    """The custom autograd Function that a node belongs to; None for an operation of torch's own."""
    return getattr(type(node), "_forward_cls", None)


def attributes_kept(node: Any) -> tuple[str, ...]:
    """The names of tensors that a Function's forward keeps as attributes of ctx."""
    return tuple(
        name for name, value in getattr(node, "__dict__", {}).items() if isinstance(value, torch.Tensor)
    )


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
