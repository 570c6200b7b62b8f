"""Each module and each custom autograd Function alone, on the inputs it really gets.

    ⟨u, J v⟩ by differences of f        against        ⟨Jᵀu, v⟩ by its backward

One that fails while everything inside it passes is where the backward is wrong.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clinometer.gradients.check.call_capture import CapturedCall
from clinometer.gradients.check.likely_mistakes import Hint, hint_of, names_of_inputs
from clinometer.gradients.check.localise import largest_share
from clinometer.gradients.check.numerics.finite_differences import DIRECTIONS, Judgement, reals
from clinometer.gradients.check.numerics.float64 import Float64Tensors, InDouble
from clinometer.gradients.check.numerics.perturbation import NotRepeatable, Probe
from clinometer.gradients.report.places import Where
from clinometer.gradients.sandbox.tensors import tensors_in
from clinometer.torch_internals.custom_functions import (
    argument_names,
    attributes_kept,
    has_setup_context,
    operator_name,
    without_modes,
)
from clinometer.torch_internals.tensors import has_hooks, is_wrapper

Surrogate = Literal["", "identity", "steps", "sampled"]
Flaw = Literal["", "no_derivative", "repeated", "second"]
APPROXIMATE = 1e-3
"""Up to this relative error a backward is approximate, and not wrong: a solver's, a rounded constant's."""


@dataclass(frozen=True)
class LayerCheck:
    """The backward of one module, or of one custom Function, against its own forward."""

    path: str
    """Dotted path of the module; for a Function, of the module that called it."""
    kind: str
    """Name of the class."""
    function: bool
    """Whether it is a custom autograd Function."""
    judgement: Judgement
    wrong_parts: tuple[str, ...] = ()
    """"input" and names of its own parameters; empty when it passes."""
    surrogate: Surrogate = ""
    """Most likely meant: "identity" passes its input on and changes the gradient, "steps" has slope 0."""
    where: Where | None = None
    precision: str = "float64"
    upstream: tuple[str, ...] = ()
    """Tensors that its input was computed from; known for one that fails."""
    own: tuple[str, ...] = ()
    """Tensors that it was given themselves."""
    called: Where | None = None
    """Of a custom operator: the line that calls it."""
    hint: Hint | None = None
    """What a wrong backward of a Function was measured to be."""
    share: float = 0.0
    """Of one that is right up to this relative error in every part: the error; else 0."""
    operation: bool = False
    """Whether it is one call of torch."""
    flaw: Flaw = ""
    """What kind of wrong: no derivative at all, an index that occurs twice, the second derivative only."""
    kept: tuple[str, ...] = ()
    """Tensors that a Function keeps as attributes of ctx: constants for its second derivative."""

    @property
    def passed(self) -> bool:
        return self.judgement.verdict != "wrong" or self.share > 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "kind": self.kind,
            "function": self.function,
            "passed": self.passed,
            "analytic": self.judgement.analytic,
            "numeric": self.judgement.numeric,
            "tolerance": self.judgement.tolerance,
            "wrong_parts": list(self.wrong_parts),
            "surrogate": self.surrogate,
            "where": None if self.where is None else self.where.to_dict(),
            "precision": self.precision,
            "called": None if self.called is None else self.called.to_dict(),
            "hint": self.hint,
            "share": self.share,
            "operation": self.operation,
            "flaw": self.flaw,
        }


def check_call(
    call: CapturedCall,
    doubling: InDouble | None,
    doubled: Float64Tensors,
    rewind: Callable[[], None],
    seed: int,
    verdict: Callable[[Probe, Iterable[str], torch.Generator], Judgement] | None = None,
    *,
    second: bool = False,
) -> LayerCheck | None:
    """The verdict on one call; None when it cannot be repeated alone, or nothing in it has a gradient.

    `second` asks for its second derivative: is the derivative of its backward that of what it computes?
    """
    judge = verdict or _judge
    rewind()  # a forward may have put another parameter in the place of one: each run begins without it
    module = call.target if isinstance(call.target, nn.Module) else None
    if module is not None and any(m.training != t for m, t in call.training.items()):
        return None
    tensors = {f"input {i}": x for i, x in enumerate(call.inputs) if x.is_floating_point() or x.is_complex()}
    own = {} if module is None else dict(module.named_parameters(recurse=False))
    # A hook on a parameter changes what arrives at it; that is not this layer's backward.
    tensors |= {
        name: p
        for name, p in own.items()
        if p.requires_grad and p.layout is torch.strided and not has_hooks(p)
        if not is_wrapper(p)  # its numbers cannot be moved one by one
    }
    if not tensors or any(t.numel() == 0 for t in tensors.values()):
        return None
    weighed = (_SecondOrder if second else _Weighed)(call, rewind, seed)
    probe = Probe(weighed, tensors, doubling, doubled)
    for x in call.inputs:
        x.requires_grad_()
    try:
        probe.begin(magnitude=0.0)
        probe.repeat()
        if weighed.size is None:
            return None
        probe.magnitude = max(probe.magnitude, 2 * weighed.size)
    except NotRepeatable:
        return None
    except Exception:  # alone, outside its surroundings, a module may not run at all
        return None
    generator = torch.Generator().manual_seed(seed)
    judged = judge(probe, tensors, generator)
    for _ in range(DIRECTIONS - 1):
        if judged.verdict == "wrong":
            judged = judge(probe, tensors, generator)
    if judged.verdict != "wrong":
        return LayerCheck(call.path, _kind(call), module is None, judged)
    wrong = [n for n in tensors if judge(probe, [n], generator).verdict == "wrong"]
    parts = tuple(dict.fromkeys("input" if n.startswith("input ") else n for n in wrong))
    if second:
        return LayerCheck(
            call.path,
            _kind(call),
            True,
            judged,
            parts,
            where=_where(call),
            called=call.where,
            flaw="second",
            kept=weighed.kept,
        )
    share = _approximate(probe, wrong, judged, generator) if verdict is None else 0.0
    if share:
        where = _where(call)
        return LayerCheck(call.path, _kind(call), module is None, judged, parts, where=where, share=share)
    surrogate = _surrogate(probe, weighed, tensors, judged) if module is None else ""
    hint = None
    if module is None and not surrogate and verdict is None and not call.operation:
        hint = hint_of(
            probe, wrong, _arguments(call), weighed.compute, weighed.weights, judged.step, generator
        )
    return LayerCheck(
        call.path,
        _kind(call),
        module is None,
        judged,
        parts,
        surrogate,
        _where(call),
        called=call.where,
        hint=hint,
    )


def _approximate(probe: Probe, wrong: Iterable[str], judged: Judgement, generator: torch.Generator) -> float:
    """The relative error of a backward that is right but for a small one in every part; 0 if it is not."""
    largest = judged.share
    for name in wrong:
        if largest <= APPROXIMATE:
            largest = max(largest, largest_share(probe, name, judged.step, generator))
    return largest if largest <= APPROXIMATE else 0.0


def _judge(probe: Probe, names: Iterable[str], generator: torch.Generator) -> Judgement:
    return probe.judge({name: probe.direction(name, generator) for name in names})


class _Weighed:
    """⟨u, f(x)⟩ with one fixed random u."""

    def __init__(self, call: CapturedCall, rewind: Callable[[], None], seed: int) -> None:
        self._call = call
        self._rewind = rewind
        self._seed = seed
        self.weights: list[Tensor] = []
        self.size: float | None = None
        """‖u⊙f(x)‖₂ at the first run: what the sum's rounding is measured by. None: no output."""
        self.outputs: list[Tensor] = []
        self.kept: tuple[str, ...] = ()

    def compute(self) -> list[Tensor]:
        """The outputs that carry a gradient, for the inputs as they are now."""
        call = self._call
        self._rewind()
        call.random.restore()
        memo: dict[int, Any] = {id(x): x.clone() for x in call.inputs}
        args, kwargs = copy.deepcopy(call.arguments, memo)
        with torch.enable_grad():
            target = call.target
            came = target.apply(*args, **kwargs) if isinstance(target, type) else target(*args, **kwargs)
            return [_real(out) for out in tensors_in(came) if out.requires_grad]

    def __call__(self) -> Tensor:
        outputs = self.compute()
        with torch.enable_grad():
            if not self.weights:
                generator = torch.Generator().manual_seed(self._seed + 1)
                self.weights = [
                    torch.empty(out.shape, dtype=torch.float64).normal_(generator=generator).to(out.device)
                    for out in outputs
                ]
                self.outputs = [out.detach().to(torch.float64, copy=True) for out in outputs]
                if outputs:
                    pairs = zip(self.weights, self.outputs, strict=True)
                    self.size = sum(float((u * y).square().sum()) for u, y in pairs) ** 0.5
            total = torch.zeros((), dtype=torch.float64)
            for u, out in zip(self.weights, outputs, strict=False):
                total = total + (u * out.to(torch.float64)).sum().to(total.device)  # of several devices
            return total


def _real(out: Tensor) -> Tensor:
    """An output as real numbers, a complex one as pairs."""
    return torch.view_as_real(out.resolve_conj()) if out.is_complex() else out


class _SecondOrder(_Weighed):
    """⟨u, Jᵀw⟩ with fixed random u and w: the backward of a call as a function of what it was given."""

    def __init__(self, call: CapturedCall, rewind: Callable[[], None], seed: int) -> None:
        super().__init__(call, rewind, seed)
        self._arriving: list[Tensor] = []

    def compute(self) -> list[Tensor]:
        outputs = super().compute()
        if not outputs:
            return []
        if not self._arriving:
            generator = torch.Generator().manual_seed(self._seed + 2)
            self._arriving = [
                torch.empty(out.shape, dtype=torch.float64).normal_(generator=generator).to(out)
                for out in outputs
            ]
            self.kept = attributes_kept(outputs[0].grad_fn)
        inputs = [x for x in self._call.inputs if x.is_floating_point()]
        with torch.enable_grad(), without_modes():  # what comes without a graph is not to be held constant
            found = torch.autograd.grad(outputs, inputs, self._arriving, create_graph=True, allow_unused=True)
        return [grad for grad in found if grad is not None]


def _surrogate(
    probe: Probe, weighed: _Weighed, tensors: Mapping[str, Tensor], judged: Judgement
) -> Surrogate:
    """Whether a wrong backward looks meant: an unchanged forward, or one that goes in steps."""
    inputs = list(tensors.values())
    same = [
        any(x.shape == out.shape and torch.equal(reals(x), reals(out)) for x in inputs)
        for out in weighed.outputs
    ]
    if same and all(same):
        return "identity"
    if judged.numeric == 0 and judged.analytic != 0:
        return "steps"
    return "steps" if any(_goes_in_steps(probe, name) for name in tensors) else ""


def _goes_in_steps(probe: Probe, name: str) -> bool:
    """Whether the value stays the same as one tensor is moved a little, changes as it is moved far, and its
    gradient is not zero: quantisation, whatever else (a scale) has a gradient beside it."""
    grad = probe.gradients[name]
    if grad is None or grad.is_complex() or not bool(grad.any()):
        return False
    v = probe.direction(name, torch.Generator().manual_seed(7))
    along = probe.along({name: v})
    return all(along(t) == probe.here for t in (1e-6, -1e-6, 1e-9, -1e-9)) and any(
        along(t) != probe.here for t in (0.3, 1.0, 3.0, 10.0)
    )


def _arguments(call: CapturedCall) -> list[str]:
    """What the forward calls its inputs."""
    if call.operation:
        return [f"input {i}" for i in range(len(call.inputs))]
    if not isinstance(call.target, type):
        return names_of_inputs(argument_names(call.target), call.arguments[0], call.inputs)
    takes_context = not has_setup_context(call.target)
    try:
        parameters = list(inspect.signature(call.target.forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return names_of_inputs(named[1 if takes_context else 0 :], call.arguments[0], call.inputs)


def _kind(call: CapturedCall) -> str:
    if call.operation:
        return call.operation
    if isinstance(call.target, nn.Module):
        return type(call.target).__name__
    return call.target.__name__ if isinstance(call.target, type) else operator_name(call.target)


def _where(call: CapturedCall) -> Where | None:
    """The definition of the backward, or of the forward of a module that is not torch's."""
    if call.operation:
        return call.where
    if call.backward is not None:
        return definition(call.backward, call.path) or call.where
    module = isinstance(call.target, nn.Module)
    kind: Any = type(call.target) if module else call.target
    if module and kind.__module__.startswith("torch."):
        return None
    return definition(kind.forward if module else kind.backward, call.path)


def definition(function: Any, module: str = "") -> Where | None:
    """Where a function is written, at its `def`."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    try:
        file = inspect.getsourcefile(function) or ""
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        return None
    skip = next((i for i, line in enumerate(lines) if line.lstrip().startswith(("def ", "async def "))), 0)
    return Where(file, first + skip, function.__qualname__.rpartition("<locals>.")[2], "", module)
