"""What stands around a backward: hooks on tensors and modules, checkpoints, hooks on what is saved."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint as checkpoints

MODULE_HOOKS = ("_get_backward_hooks", "_get_backward_pre_hooks")
"""Methods of nn.Module that give the hooks of its backward when it is called."""
CHECKPOINTS = checkpoints
"""The module of torch.utils.checkpoint."""
WITHOUT_REENTRANT = next(
    (n for n in ("_checkpoint_without_reentrant_generator_impl",) if hasattr(checkpoints, n)),
    "_checkpoint_without_reentrant_generator",
)
"""Its generator around the forward of a checkpoint; takes (function, preserve_rng_state, …), and from 2.14 on
(function, args, kwargs, *, preserve_rng_state, …)."""
OF_TORCH = ("torch.utils.checkpoint", "clinometer")
"""Where the hooks on saved tensors come from that are no one's choice."""


def tensor_hooks(tensor: Tensor) -> dict[Any, Any]:
    """The hooks on a tensor's gradient, by key; empty if there are none."""
    return getattr(tensor, "_backward_hooks", None) or {}


def is_chosen(hooks: Any) -> bool:
    """Whether hooks on saved tensors are the person's, or a library's, and not a checkpoint's or ours."""
    return isinstance(hooks, saved_tensors_hooks) and not type(hooks).__module__.startswith(OF_TORCH)
