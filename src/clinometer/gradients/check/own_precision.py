"""What the model computes at its own precision: its gradient against float64's, and layers that need it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clinometer.gradients.check.call_capture import CapturedCall, custom_functions, custom_operators
from clinometer.gradients.check.layer_checks import LayerCheck, check_call
from clinometer.gradients.check.numerics.finite_differences import Judgement
from clinometer.gradients.check.numerics.float64 import LIFT, Float64Tensors, in_double
from clinometer.gradients.check.numerics.frequency_scaling import UndividedLookups
from clinometer.gradients.check.numerics.perturbation import Probe, backward
from clinometer.gradients.report.formatting import words
from clinometer.gradients.report.places import Where
from clinometer.gradients.sandbox.closure import Closure, evaluate
from clinometer.gradients.sandbox.random_state import RandomState
from clinometer.gradients.sandbox.sandbox import Before
from clinometer.gradients.trace.checkpointing import opened_checkpoints
from clinometer.gradients.trace.function_calls import function_calls

ROUGH = 0.05
"""Share of ‖g⊙v‖ that differences at low precision may be off before anyone is accused."""
CANCELS = 1e-9
"""Of the whole gradient: what is smaller cancels by construction (a key's bias), and is rounding alone."""
_STEPS = (0.1, 0.03, 0.01)


@dataclass
class OwnGradients:
    """One backward at the model's own precision."""

    dtypes: dict[str, str]
    gradients: dict[str, Tensor]
    """Of low-precision tensors, and only if the closure draws no random numbers: in float64 others come."""
    functions: list[type]
    """Custom autograd Functions in the graph."""
    operators: dict[str, Any]
    """Custom operators in the graph, by qualified name, and their backward."""
    divided: dict[int, Where | None]
    """id of each tensor whose gradient is divided by frequencies, and where; here it is not."""
    loss: float
    size: float = 0.0
    """Norm of all of them together."""
    computed: str = ""
    """The 16-bit type in which calls computed, as autocast asks them to."""

    @classmethod
    def of(cls, closure: Closure, tensors: Mapping[str, Tensor], before: Before) -> OwnGradients:
        dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
        low = {name: tensor for name, tensor in tensors.items() if tensor.dtype in LIFT}
        before.rewind()
        state = RandomState()
        inside: list[type] = []
        operators: dict[str, Any] = {}

        def seen(out: Tensor) -> None:
            inside.extend(custom_functions(out))
            operators.update(custom_operators(out))

        def called(kind: type, call: Any, args: Any, kwargs: Any) -> Any:
            if not kind.__module__.startswith("torch."):  # one that only a derivative uses is in no graph
                inside.append(kind)
            return call(*args, **kwargs)

        divided, watch = UndividedLookups(), _CallWatch()
        with opened_checkpoints(seen), divided, watch, function_calls(called):
            loss = evaluate(closure)
        seen(loss)
        functions = list(dict.fromkeys(inside))
        if not low or watch.draws or not state.same_as(RandomState()):
            return cls(dtypes, {}, functions, operators, divided.where, float(loss.detach()))

        def again() -> Tensor:
            before.rewind()
            return evaluate(closure)

        found = backward(loss, low, again)
        kept = {name: grad for name, grad in found.items() if grad is not None}
        size = sum(float(torch.linalg.vector_norm(grad)) ** 2 for grad in kept.values()) ** 0.5
        value, computed = float(loss.detach()), watch.lowest
        return cls(dtypes, kept, functions, operators, divided.where, value, size, computed)

    def distance(self, name: str, exact: Tensor | None) -> float | None:
        """‖g − g₆₄‖ / ‖g₆₄‖; forgets the gradient it compared."""
        own = self.gradients.pop(name, None)
        if own is None or exact is None:
            return None
        size = float(torch.linalg.vector_norm(exact))
        if size <= CANCELS * self.size:
            return None
        return float(torch.linalg.vector_norm(own.to(exact.dtype) - exact)) / size


class _CallWatch(TorchFunctionMode):
    """Whether random numbers are drawn, from whatever generator, and the lowest precision of a result."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = False
        self.lowest = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if kwargs.get("generator") is not None or getattr(func, "__name__", "") in _RANDOM:
            self.draws = True
        if isinstance(out, Tensor) and out.dtype in (torch.bfloat16, torch.float16):
            self.lowest = str(out.dtype).removeprefix("torch.")
        return out


_RANDOM = words(
    """
    rand randn rand_like randn_like normal normal_ uniform_ bernoulli bernoulli_ exponential_ cauchy_
    log_normal_ geometric_ multinomial poisson binomial dropout dropout_ dropout1d dropout2d dropout3d
    alpha_dropout feature_dropout feature_alpha_dropout rrelu rrelu_ gumbel_softmax fractional_max_pool2d
    fractional_max_pool3d _standard_gamma _sample_dirichlet
    """
)
"""Calls whose numbers are others in float64; those of fork_rng leave the global generator as it was."""


def check_at_own_precision(
    calls: list[CapturedCall], rewind: Callable[[], None], seed: int
) -> list[LayerCheck]:
    """Each layer alone where the whole cannot run in float64: in float64 if it can, else as it is."""
    found = []
    for position, call in enumerate(calls):
        parameters = list(call.target.parameters()) if isinstance(call.target, nn.Module) else []
        originals = [x.data for x in call.inputs]
        with in_double([*parameters, *call.inputs]) as (mode, doubled):
            layer = check_call(call, mode, doubled, rewind, seed + position)
        if layer is None:
            for x, data in zip(call.inputs, originals, strict=True):
                x.data = data
            layer = check_call(call, None, Float64Tensors(()), rewind, seed + position, _roughly)
            if layer is not None:
                layer = replace(layer, precision=_precision(call))
        if layer is not None:
            found.append(layer)
    return found


def _roughly(probe: Probe, names: Iterable[str], generator: torch.Generator) -> Judgement:
    """A coarse verdict: wrong only if three step sizes agree that much is missing."""
    steps = {name: probe.direction(name, generator) for name in names}
    analytic, scale = probe.slope_by_gradient(steps)
    along = probe.along(steps)
    best: Judgement | None = None
    for h in _STEPS:
        numeric = (along(h) - along(-h)) / (2 * h)
        allowed = ROUGH * max(scale, abs(numeric)) + _eps(probe) * probe.magnitude / h
        verdict = "passed" if abs(numeric - analytic) <= allowed else "wrong"
        judged = Judgement(verdict, analytic, numeric, allowed, h)
        if judged.verdict == "passed":
            return judged
        best = judged if best is None or abs(judged.error) < abs(best.error) else best
    assert best is not None
    return best


def _eps(probe: Probe) -> float:
    return max((torch.finfo(t.dtype).eps for t in probe.tensors.values()), default=0.0)


def _precision(call: CapturedCall) -> str:
    tensors = [*call.inputs, *(call.target.parameters() if isinstance(call.target, nn.Module) else [])]
    return str(tensors[0].dtype).removeprefix("torch.") if tensors else "float32"
