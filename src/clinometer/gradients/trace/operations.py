"""What a call of torch does to a path: nothing, gives a new tensor, writes one, lets a value out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from clinometer.distributed.sharded_tensors import is_sharded
from clinometer.gradients.report.formatting import words
from clinometer.torch_internals.frames import is_clipping, is_scaler

_ESCAPES = {
    "item": "item",
    "tolist": "tolist",
    "numpy": "numpy",
    "__array__": "numpy",
    "__float__": "float",
    "__int__": "int",
    "__complex__": "complex",
    "__dlpack__": "numpy",
}
_VIEWS = {"T", "mT", "H", "mH", "real", "imag"}
_QUIET = words(
    """
    size dim numel nelement stride storage_offset element_size ndimension is_contiguous
    is_floating_point is_complex is_signed is_inference is_nonzero get_device register_hook
    register_post_accumulate_grad_hook retain_grad __len__ __bool__ __hash__ __repr__ __format__ __str__
    __index__ __contains__ data_ptr untyped_storage storage is_pinned is_shared has_names is_same_size
    equal allclose is_tensor is_set_to _is_view dim_order requires_grad_ share_memory_ __dir__
    __reduce_ex__ result_type can_cast zeros_like ones_like empty_like full_like rand_like
    randn_like randint_like new_zeros new_ones new_empty new_full empty zeros ones
    arange rand randn randint randperm linspace eye set_printoptions is_storage get_default_dtype
    _has_compatible_shallow_copy_type is_grad_enabled _assert broadcast_shapes __deepcopy__
    """
)
_WRITERS = words(
    """
    __setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ipow__ __iand__ __ior__
    """
)
_LOST_BY = {
    "detach": "detach",
    "detach_": "detach",
    "tensor": "tensor",
    "new_tensor": "tensor",
    "Parameter": "parameter",
    "grad": "grad",
}


@cache
def kind_of(func: Any) -> tuple[str, str]:
    """The name of a call as a person writes it, and its kind.

    quiet: no path passes · escape: a number or array comes out · alias: shares memory, forgets the path ·
    write: `.data =` · backward · grad_mode · op: anything else.
    """
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__", "__delete__"):
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if attribute == "data":
            return "data", "alias" if name == "__get__" else "write"
        return attribute, "op" if name == "__get__" and attribute in _VIEWS else "quiet"
    if name in _ESCAPES:
        return _ESCAPES[name], "escape"
    if name in ("_set_grad_enabled", "set_grad_enabled"):
        return name, "grad_mode"
    if func is Tensor.backward:
        return name, "backward"
    if name in ("detach", "detach_"):
        return name, "alias"
    return name, "quiet" if name in _QUIET else "op"


def written_by(name: str, kind: str, ins: list[Tensor], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor a call writes in place, if it writes one."""
    if isinstance(kwargs.get("out"), Tensor):
        return kwargs["out"]
    if not ins:
        return None
    if kind == "write" or name in _WRITERS or kwargs.get("inplace") is True:
        return ins[0]
    return ins[0] if name.endswith("_") and not name.endswith("__") and name != "detach_" else None


ATTENTION = words("multi_head_attention_forward scaled_dot_product_attention")


def masks_that_hide_all(name: str, kwargs: Mapping[str, Any]) -> str:
    """The argument of an attention that hides every position from every query: "key_padding_mask".

    When none does alone, all masks that were given.

    torch's two conventions are opposite: True hides in multi_head_attention_forward and shows in
    scaled_dot_product_attention; −∞ hides in both.
    """
    given, hides = [], []
    for argument in ("attn_mask", "key_padding_mask"):
        mask = kwargs.get(argument)
        if isinstance(mask, Tensor) and mask.numel() and not mask.is_meta and not is_sharded(mask):
            if mask.is_floating_point():
                hidden = torch.isneginf(mask)
            else:
                hidden = ~mask.bool() if name == "scaled_dot_product_attention" else mask.bool()
            given.append(argument)
            if bool(hidden.all()):
                hides.append(argument)
    return " + ".join(hides or given)


def cut_kind(name: str, kind: str, out: Tensor) -> str:
    """How a call lost the path: which sentence explains it."""
    if kind in ("function", "checkpoint"):
        return kind
    if kind == "write":
        return "overwritten"
    if name in _LOST_BY:
        return "deepcopy" if _deep_copying() else _LOST_BY[name]
    if name == "data":
        return "deepcopy" if _deep_copying() else "data"
    if not (out.is_floating_point() or out.is_complex()):
        return "integer"
    if torch.is_inference_mode_enabled():
        return "inference_mode"
    if not torch.is_grad_enabled():
        return "overwritten" if name.endswith("_") or name in _WRITERS else "no_grad"
    return "operation"


def _deep_copying() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__deepcopy__":
            return True
        frame = frame.f_back
    return False


AMP = words(
    """
    mul __mul__ __rmul__ _amp_foreach_non_finite_check_and_unscale_ _foreach_norm vector_norm
    linalg_vector_norm norm
    """
)
"""Calls that may belong to a GradScaler or to clipping."""


def amp_event(name: str, frame: Any) -> str:
    """What a call of `AMP` means, by who calls it: "scaled", "unscaled", "clipped" or ""."""
    if name.startswith("_amp"):
        return "unscaled"
    if "mul" in name:
        return "scaled" if is_scaler(frame.f_code) else ""
    for _ in range(6):
        if frame is None:
            break
        if is_clipping(frame.f_code):
            return "clipped"
        frame = frame.f_back
    return ""
