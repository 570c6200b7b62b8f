"""Modules, FSDP's parameters, and the processes that share them."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from clinometer.torch_internals.look_up import look_up

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Children that only a wrapper has: torch.compile, FSDP, activation checkpointing and Lightning's Fabric."""
BatchNorm: Any = look_up("nn.modules.batchnorm._BatchNorm") or (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
)  # fmt: skip
"""For isinstance: every batch normalisation."""
RunningNorm: Any = look_up("nn.modules.batchnorm._NormBase") or (
    BatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
"""For isinstance: every normalisation that may keep running statistics."""
Dropout: Any = look_up("nn.modules.dropout._DropoutNd") or (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
"""For isinstance: every dropout layer."""
_any_global_hook = look_up("nn.modules.module._has_any_global_hook")


def own_parameters(module: Any) -> dict[str, nn.Parameter | None]:
    """A module's own parameters by name, without those of its children; none before its __init__ has run."""
    return vars(module).get("_parameters") or {}


def child_of(module: nn.Module | None, name: str) -> nn.Module | None:
    """The child of this name; None if there is none."""
    # A scripted module's `_modules` is no dict: it has `in` and `[…]` only.
    return module._modules[name] if module is not None and name in module._modules else None


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile wraps this very module, or `module.compile()` was called."""
    return (
        child_of(module, "_orig_mod") is not None or getattr(module, "_compiled_call_impl", None) is not None
    )


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether calling a module runs hooks of its own; those of all modules: `any_global_hook`."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_full_backward_hooks(module: nn.Module) -> bool:
    """Whether a module's input or output passes through torch's Function for full backward hooks."""
    hooks = getattr(module, "_backward_hooks", None) or getattr(module, "_backward_pre_hooks", None)
    return bool(hooks)


def any_global_hook() -> bool:
    """Whether every module runs hooks when it is called; True too where that cannot be seen."""
    return _any_global_hook is None or bool(_any_global_hook())


# Sharded parameters and the processes that share them.


def fsdp_groups(module: nn.Module) -> list[Any]:
    """The groups of parameters that FSDP2 gathers for this module itself."""
    get = getattr(module, "_get_fsdp_state", None)
    if get is None or "torch.distributed.fsdp" not in sys.modules:
        return []
    state = get()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before torch 2.12 there was one
        one = getattr(state, "_fsdp_param_group", None)
        groups = [] if one is None else [one]
    return list(groups)


def shard_group(group: Any) -> None:
    """The parameters of an FSDP group are shards again, if a forward left them whole."""
    if not group.is_sharded:
        group._to_sharded()


def was_gathered(part: Any) -> bool:
    """Whether FSDP has made the whole parameter of a shard: it does when it first gathers."""
    return hasattr(part, "_unsharded_param")


def gathered(part: Any) -> Tensor:
    """The whole parameter that FSDP computes with, of one that it holds as a shard."""
    return part._unsharded_param


def default_store() -> Any:
    """The store of the default process group; None if this torch does not give it away."""
    import torch.distributed as dist

    get = getattr(getattr(dist, "distributed_c10d", None), "_get_default_store", None)
    return None if get is None else get()
