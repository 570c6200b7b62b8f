"""torch's optimizer base, without the compiler where nothing was compiled.

torch keeps torch.compile out of a few of its methods by a decorator whose first call imports torch._dynamo:
1.3 s, twice what the rest of a small model's start takes, for a run that compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.optim import Optimizer

from clinometer.torch_internals.frames import compiler_is_loaded


def _without_compiler(method: Callable[..., Any]) -> Callable[..., Any]:
    bare = getattr(method, "__wrapped__", method)

    @wraps(bare)
    def chosen(self: Optimizer, *arguments: Any, **named: Any) -> Any:
        # If the compiler is loaded, the caller may be inside a compiled function and gets torch's own.
        return (method if compiler_is_loaded() else bare)(self, *arguments, **named)

    return chosen


class EagerOptimizer(Optimizer):
    """torch.optim.Optimizer, the same in everything but what it imports."""

    add_param_group = _without_compiler(Optimizer.add_param_group)
    zero_grad = _without_compiler(Optimizer.zero_grad)
    state_dict = _without_compiler(Optimizer.state_dict)
    load_state_dict = _without_compiler(Optimizer.load_state_dict)
