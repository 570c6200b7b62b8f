"""The operations that a call of torch is made of: `F.normalize` is a norm, a clamp and a division.

They are seen with their arguments under torch's own names, inside custom Functions and checkpoints too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from clinometer.gradients.sandbox.tensors import tensors_in
from clinometer.torch_internals.custom_functions import Operator, argument_names, operator_name
from clinometer.torch_internals.look_up import look_up

Listener = Callable[[str, Mapping[str, Any], list[Tensor]], None]
"""(name of the operation, its arguments by name as they were before, its results)."""
_Mode: Any = look_up("utils._python_dispatch.TorchDispatchMode")


@contextmanager
def primitive_calls(listener: Listener) -> Iterator[bool]:
    """Inside, `listener` is called after each operation of this thread; False if this torch shows none."""
    if _Mode is None:
        yield False
        return
    with _mode(listener):
        yield True


def _mode(listener: Listener) -> Any:
    class PrimitiveMode(_Mode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if not isinstance(func, Operator):  # a transform or the like: what it calls is seen
                return func(*args, **kwargs)
            names = argument_names(func)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if operator_name(func).endswith("_") and args and isinstance(args[0], Tensor):
                given[names[0]] = args[0].clone()  # what is written over
            out = func(*args, **kwargs)
            listener(operator_name(func).partition("::")[2], given, list(tensors_in(out)))
            return out

    return PrimitiveMode()
