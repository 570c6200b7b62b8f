"""Which calls move a parameter's entries about, which join, add or multiply, and which only look."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clinometer.gradients.sandbox.tensors import tensors_in

VIEWS = frozenset(
    """t transpose swapaxes swapdims permute movedim moveaxis view reshape view_as reshape_as flatten
    unflatten ravel squeeze unsqueeze expand expand_as broadcast_to chunk split split_with_sizes tensor_split
    unbind select narrow __getitem__ index_select T mT H mH adjoint flip roll tile repeat diagonal
    """.split()  # noqa: SIM905
)
COPIES = frozenset(
    "to type float half bfloat16 double type_as clone contiguous cpu cuda requires_grad_ alias".split()  # noqa: SIM905
)
JOINS = frozenset(("cat", "concat", "concatenate", "stack", "hstack", "vstack"))
MATMULS = frozenset(("matmul", "mm", "bmm", "mv", "__matmul__", "__rmatmul__"))
ADDS = frozenset(("add", "__add__", "__radd__", "__iadd__", "add_"))
SUBTRACTIONS = frozenset(("sub", "__sub__", "subtract", "__rsub__"))
MULS = frozenset(("mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply"))
DIVISIONS = frozenset(("div", "__truediv__", "true_divide"))
NEGATIONS = frozenset(("neg", "__neg__", "negative"))
OPENED = frozenset(("multi_head_attention_forward", "backward"))
"""Python functions that would hide what they call: attention's products, and the forwards that reentrant
checkpointing runs in a backward."""
LOOKS = frozenset(
    """size dim ndim shape dtype device numel nelement is_floating_point is_complex requires_grad layout
    is_sparse is_cuda is_leaf grad_fn __len__ stride storage_offset data_ptr is_contiguous element_size detach
    data _version grad is_inference is_meta names itemsize nbytes __hash__ __repr__ __format__ item tolist
    numpy untyped_storage is_pinned register_hook get_device is_mps is_xpu is_quantized new_zeros new_ones
    new_empty zeros_like ones_like empty_like has_names is_nested is_same_size dense_dim sparse_dim
    """.split()  # noqa: SIM905
)
"""Calls through which no gradient comes back."""


class Arguments:
    """Arguments by place or by any of their names."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._args, self._kwargs = args, kwargs

    def __call__(self, place: int, *names: str) -> Any:
        if place < len(self._args):
            return self._args[place]
        return next((self._kwargs[n] for n in names if n in self._kwargs), None)


def name_of(func: Any) -> str:
    name = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", name) if name in ("__get__", "__set__") else name


def is_number(value: Any) -> bool:
    return not isinstance(value, Tensor) or (value.numel() == 1 and not value.requires_grad)


def needs_grad(out: Any) -> bool:
    return any(t.requires_grad for t in tensors_in(out))


def as_autocast_hands_it(x: Tensor, out: Tensor) -> Tensor:
    """An input of a product in the precision it is multiplied in."""
    device = out.device.type
    low = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if low and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def normalise(name: str, get: Arguments) -> Callable[[], Tensor]:
    """What layer_norm or rms_norm multiplies with its weight, in float64."""
    x, shape = get(0, "input").detach(), tuple(get(1, "normalized_shape"))
    if name == "layer_norm":
        eps = get(4, "eps")
        return lambda: F.layer_norm(x.double(), shape, None, None, 1e-5 if eps is None else eps)
    eps = get(3, "eps")
    return lambda: F.rms_norm(x.double(), shape, None, torch.finfo(x.dtype).eps if eps is None else eps)


def open_up(function: Any) -> Any:
    """The same Python function of torch, not handing itself to the mode, so that its inside is seen.

    If it is wrapped, as torch.autograd.backward is while a watch lives, the function inside the wrapper.
    """
    function = inspect.unwrap(function)
    scope = {
        **function.__globals__,
        "has_torch_function": lambda _: False,
        "has_torch_function_unary": lambda _: False,
        "has_torch_function_variadic": lambda *_: False,
    }
    opened = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened
