"""The first rung: the derivative of the loss along one direction by forward-mode differentiation.

    J v, by dual numbers        against        ⟨g, v⟩

A thousand times finer than differences, for the price of three evaluations. It is no second witness, for many
of torch's forward rules are derived from its backward ones: so it is reported, and the differences decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clinometer.gradients.calls import name_of
from clinometer.gradients.differences import EPS, ROUNDING
from clinometer.gradients.function_calls import function_calls, in_custom

RELATIVE = 1e-12
_VIEWS = {"T", "mT", "H", "mH", "real", "imag"}
_AS_THEY_ARE = {"register_hook", "requires_grad_", "__deepcopy__", "__reduce_ex__", "__set__"}


@dataclass(frozen=True)
class ForwardMode:
    """One direction through all tensors; `reason` says why there is no number."""

    analytic: float = 0.0
    forward: float = 0.0
    tolerance: float = 0.0
    reason: str = ""

    @property
    def agrees(self) -> bool | None:
        """None where it was not possible."""
        return None if self.reason else abs(self.forward - self.analytic) <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        return {
            "agrees": self.agrees,
            "analytic": self.analytic,
            "forward": self.forward,
            "tolerance": self.tolerance,
            "reason": self.reason,
        }


def by_forward_mode(
    run: Callable[[], Tensor],
    surroundings: Callable[[], AbstractContextManager[Any]],
    tensors: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
    slope: tuple[float, float],
    magnitude: float,
) -> ForwardMode:
    """J v in the `surroundings` of the other evaluations; `slope` is `⟨g, v⟩` and `‖g⊙v‖₂`.

    An operation without a forward rule is a reason, so is a tensor used where no mode looks (TorchScript).
    """
    try:
        with forward_ad.dual_level():
            duals = {
                id(tensors[name]): forward_ad.make_dual(tensors[name], _like(v, tensors[name]))
                for name, v in directions.items()
            }
            with _Dual(duals) as mode, surroundings(), mode.given_to_functions():
                tangent = forward_ad.unpack_dual(run()).tangent
            unseen = duals.keys() - mode.used
            found = 0.0 if tangent is None else float(tangent.detach())
    except Exception as error:  # whatever forward mode cannot do, the differences can
        lines = str(error).strip().splitlines() or [""]
        return ForwardMode(reason=f"{type(error).__name__}: {lines[0][:160]}")
    if unseen:
        return ForwardMode(reason=f"unseen: {len(unseen)} of {len(duals)} tensors")
    analytic, scale = slope
    return ForwardMode(analytic, found, RELATIVE * scale + ROUNDING * EPS * magnitude)


class _Dual(TorchFunctionMode):
    """Gives every call the dual number in place of the tensor."""

    def __init__(self, duals: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._duals = duals
        self.used: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _AS_THEY_ARE or (name == "__get__" and name_of(func) not in _VIEWS):
            return func(*args, **kwargs)
        return func(*self._dual(args), **self._dual(kwargs))

    @contextmanager
    def given_to_functions(self) -> Iterator[None]:
        """Function.apply asks no mode, so its calls get the dual numbers for a while."""

        def dual_apply(cls: Any, call: Any, args: Any, kwargs: Any) -> Any:
            return call(*self._dual(args), **self._dual(kwargs))

        with function_calls(dual_apply):
            yield

    def _dual(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            dual = self._duals.get(id(value))
            if dual is None or in_custom():  # inside a Function's forward nothing is differentiated
                return value
            self.used.add(id(value))
            return dual
        if type(value) in (tuple, list):
            return type(value)(self._dual(item) for item in value)
        if type(value) is dict:
            return {key: self._dual(item) for key, item in value.items()}
        return value


def _like(v: Tensor, tensor: Tensor) -> Tensor:
    return torch.view_as_complex(v) if tensor.is_complex() else v
