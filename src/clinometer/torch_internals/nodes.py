"""Nodes of the autograd graph: what they saved, shapes, order; and the engine that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clinometer.torch_internals.custom_functions import function_of
from clinometer.torch_internals.look_up import look_up

_top_saved_hooks = look_up("_C._autograd._top_saved_tensors_default_hooks", "saved")
_engine = look_up("autograd.graph._engine_run_backward", "engine")


def packs_saved_tensors() -> bool:
    """Whether hooks stand that pack what nodes save, as a checkpoint's do: then it may be read once only."""
    return _top_saved_hooks is None or _top_saved_hooks(False) is not None


def saved(node: Any, name: str) -> Any:
    """What a node saved under a name, None if nothing; raises RuntimeError if it was written over."""
    return getattr(node, f"_saved_{name}", None)


def names_saved(node: Any) -> list[str]:
    """The attributes of a node that hold what it saved."""
    custom = function_of(node) is not None
    return ["saved_tensors"] if custom else [name for name in dir(node) if name.startswith("_saved_")]


def shape_into(node: Any, position: int) -> torch.Size | None:
    """The shape of one of a node's outputs, which is that of the gradient that comes in."""
    metadata = getattr(node, "_input_metadata", None)
    return None if metadata is None else metadata[position].shape


def run_node(node: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...] | None:
    """What a node would hand on for these gradients of its outputs; None if it cannot be run by itself."""
    try:
        handed = node(*gradients)
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    return handed if isinstance(handed, tuple) else (handed,)


def order_of(node: Any) -> int | None:
    """A number that grows with each node a forward makes."""
    number = getattr(node, "_sequence_nr", None)
    return None if number is None else number()


def next_order() -> int | None:
    """The number that a node made now would have: those made before have smaller ones."""
    with torch.inference_mode(False), torch.enable_grad():
        return order_of(torch.zeros((), requires_grad=True).neg().grad_fn)


def run_backward(loss: Tensor, tensors: Sequence[Tensor], *, accumulate: bool) -> Sequence[Tensor | None]:
    """The gradients of `tensors`, or none, but accumulated; a mode that stands sees the backward's calls."""
    ones = torch.ones_like(loss)
    if _engine is None and accumulate:
        torch.autograd.backward(loss, ones)
        return ()
    if _engine is None:
        return torch.autograd.grad(loss, list(tensors), ones, allow_unused=True)
    return _engine(
        (loss,), (ones,), False, False, tuple(tensors), allow_unreachable=True, accumulate_grad=accumulate
    )
