"""Is the gradient right? `check_gradients` climbs from the whole model down to the entry.

Everything at once, then tensor by tensor, then inside a tensor that fails; and each module and custom
Function alone, which names the layer whose backward is wrong.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clinometer.distributed.ranks import Ranks
from clinometer.gradients.check.call_capture import Capture
from clinometer.gradients.check.findings import (
    conclude,
    divided,
    no_gradient,
    no_graph,
    not_finite,
    not_repeatable,
)
from clinometer.gradients.check.layer_checks import LayerCheck, check_call
from clinometer.gradients.check.localise import EntryCheck, check_entry, localise
from clinometer.gradients.check.numerics.finite_differences import DIRECTIONS, Judgement
from clinometer.gradients.check.numerics.float64 import LIFT, InDouble, in_double
from clinometer.gradients.check.numerics.perturbation import NotRepeatable, Probe
from clinometer.gradients.check.own_precision import OwnGradients, check_at_own_precision
from clinometer.gradients.check.result import GradientCheck, TensorCheck
from clinometer.gradients.report.places import Where
from clinometer.gradients.sandbox.closure import Closure, eagerly, evaluate
from clinometer.gradients.sandbox.public_calls import public_call
from clinometer.gradients.sandbox.sandbox import Before, modules_named_by, untouched
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.trace.function_calls import function_calls
from clinometer.gradients.trace.inplace_errors import is_overwritten
from clinometer.gradients.trace.observed_run import observe
from clinometer.messages import InputError
from clinometer.torch_internals.tensors import is_wrapper
from clinometer.torch_support import offers

MOST_NARROWED = 6
Progress = Callable[[int, int], None]
Indices = Mapping[str, Sequence[int | tuple[int, ...]]]


@public_call
def check_gradients(
    params: Any,
    closure: Closure,
    *,
    seed: int = 0,
    entries: Indices | None = None,
    progress: Progress | None = None,
) -> GradientCheck:
    """Whether autograd's gradient of every tensor is the derivative of the loss.

        [L(θ+hv) − L(θ−hv)] / 2h, extrapolated        against        ⟨g, v⟩

    In float64, whatever the model's precision. Dropout stays on and draws the same numbers at every run;
    what the closure detaches is held constant. `entries` asks for single numbers: {"w": [(3, 5)]}.
    `progress(done, total)` is called as it goes. Leaves no trace. Under DDP
    each rank checks its own loss.

    Raises InputError for what is no set of tensors or no loss, and for sharded tensors; UnknownName for a
    name in `entries`.
    """
    offers("checkpoints", "engine", "functions", "operators", "transforms")
    subject = Subject.of(params)
    ranks = Ranks(subject.tensors, [m for m in (subject.module, *modules_named_by(closure)) if m is not None])
    ranks.refuse_sharded("check.sharded")
    asked = {subject.name_of(key): [_index(i) for i in value] for key, value in (entries or {}).items()}
    quiet = progress or (lambda done, total: None)
    with (
        ranks.apart(),
        untouched(subject, closure=closure) as before,
        function_calls(),
        eagerly(),
        sdpa_kernel(SDPBackend.MATH),
    ):
        return _Check(subject, closure, before, seed, asked, quiet).run()


def _index(given: int | tuple[int, ...]) -> tuple[int, ...]:
    return (given,) if isinstance(given, int) else tuple(given)


@dataclass
class _Check:
    subject: Subject
    closure: Closure
    before: Before
    seed: int
    asked: Mapping[str, list[tuple[int, ...]]]
    progress: Progress
    evaluations: int = 0
    everything: Judgement | None = None
    layers: list[LayerCheck] = field(default_factory=list)
    functions: list[type] = field(default_factory=list)
    operators: dict[str, Any] = field(default_factory=dict)
    done: int = 0
    total: int = 0
    has_graph: bool = True
    stopped: list[Where] = field(default_factory=list)

    def run(self) -> GradientCheck:
        self.started = time.perf_counter()
        subject = self.subject
        self.checked = {n: t for n, t in subject.tensors.items() if _checkable(t)}
        try:
            own = OwnGradients.of(self.closure, self.checked, self.before)
        except (RuntimeError, IndexError) as error:
            if isinstance(error, IndexError) or is_overwritten(error):
                self._raise_its_own()
            raise
        self.functions, self.operators = own.functions, own.operators
        modules = dict.fromkeys(
            [m for m in [subject.module, *modules_named_by(self.closure)] if m is not None]
        )
        also = [p for module in modules for p in module.parameters()]
        with in_double([*self.checked.values(), *also]) as (mode, doubled):
            self.mode, self.doubled = mode, doubled
            probe = Probe(self._loss, self.checked, mode, doubled)
            try:
                probe.begin(look=self._look)
            except InputError:
                raise
            except Exception as error:  # it ran at its own precision, so float64 is what it cannot do
                broken = error
            else:
                try:
                    probe.repeat()
                except NotRepeatable:
                    if not math.isfinite(probe.here):  # NaN differs from itself: no sign of randomness
                        return self._result({}, [not_finite(probe.here)], probe)
                    return self._result({}, [not_repeatable(self._loss, mode)], probe)
                return self._ladder(probe, own)
        if not own.gradients:  # no backward has shown yet that the closure is sound as it is
            self._raise_its_own()
        self.layers = check_at_own_precision(self._capture(None), self.before.rewind, self.seed)
        return self._result({}, [], None, loss=own.loss, broken=broken)

    def _raise_its_own(self) -> None:
        """Run it as it is: what fails then is the closure's own error, raised with the line."""
        self.before.rewind()
        observe(self.subject, self.closure, self.before, Ranks(self.subject.tensors))  # nobody runs along

    def _ladder(self, probe: Probe, own: OwnGradients) -> GradientCheck:
        if not _finite(probe):
            return self._result({}, [not_finite(probe.here)], probe)
        if not self.has_graph:
            tensors = {name: self._without_gradient(name, own) for name in self.checked}
            return self._result(tensors, [no_graph(list(tensors), len(self.subject.tensors))], probe)
        calls = self._capture(self.mode)
        self.total = 1 + len(self.checked) + len(calls)
        self.everything = probe.judge_everything(self.seed)
        self._step()
        tensors: dict[str, TensorCheck] = {}
        cut: list[str] = []
        for position, name in enumerate(self.checked):
            seed = self.seed + 7 * (position + 1)
            if name in probe.unreached:
                tensors[name] = self._without_gradient(name, own)
                if probe.depends_on(name, torch.Generator().manual_seed(seed)):
                    cut.append(name)
            else:
                tensors[name] = self._tensor(probe, name, seed, own)
            self._step()
        for position, call in enumerate(calls):
            found = check_call(call, self.mode, self.doubled, self.before.rewind, self.seed + position)
            if found is not None:
                self.layers.append(self._with_names(found, call))
            calls[position] = None  # its inputs are not needed any more
            self._step()
        self._narrow(probe, tensors)
        absent = [name for name, tensor in tensors.items() if tensor.status == "no-gradient"]
        findings = no_gradient(absent, cut, len(tensors))
        findings += divided(tensors, self.checked, own.divided)
        self.stopped = probe.stopped(self.seed)
        return self._result(tensors, findings, probe)

    def _narrow(self, probe: Probe, tensors: dict[str, TensorCheck]) -> None:
        """Look inside the wrong tensors that say most: a failing layer's own, then the farthest off.

        A wrong backward spoils every tensor before it, and each costs some hundred evaluations.
        """
        own = {f"{layer.path}.{part}".lstrip(".") for layer in self.layers for part in layer.wrong_parts}
        wrong = [tensor for tensor in tensors.values() if tensor.status == "wrong"]
        wrong.sort(key=lambda tensor: (tensor.name not in own, -tensor.error / tensor.tolerance))
        for position, tensor in enumerate(wrong[:MOST_NARROWED]):
            least = 0.05 * tensor.error if abs(tensor.jump) > 0.01 * tensor.error else 0.0
            narrowed = localise(probe, tensor.name, tensor.step, least, self.seed + position)
            tensors[tensor.name] = replace(tensor, narrowed=narrowed)

    def _tensor(self, probe: Probe, name: str, seed: int, own: OwnGradients) -> TensorCheck:
        tensor = self.checked[name]
        generator = torch.Generator().manual_seed(seed)
        judged: list[Judgement] = []
        for _ in range(DIRECTIONS):
            judged.append(probe.judge({name: probe.direction(name, generator)}))
            if judged[-1].verdict == "passed":
                break
        last = judged[-1]
        verdicts = {one.verdict for one in judged}
        status = last.verdict if len(verdicts) == 1 or last.verdict == "passed" else _weakest(verdicts)
        if status == "passed" and probe.gradients[name] is None:
            status = "no-gradient"
        if status == "wrong":
            last = max(judged, key=lambda one: abs(one.error) / one.tolerance)
        return TensorCheck(
            name,
            tuple(tensor.shape),
            own.dtypes[name],
            status,
            last.analytic,
            last.numeric,
            last.tolerance,
            last.step,
            last.jump,
            probe.gradients[name] is not None,
            None,
            self._entries(probe, name),
            own.distance(name, probe.gradients[name]),
        )

    def _without_gradient(self, name: str, own: OwnGradients) -> TensorCheck:
        shape = tuple(self.checked[name].shape)
        return TensorCheck(name, shape, own.dtypes[name], "no-gradient", has_gradient=False)

    def _entries(self, probe: Probe, name: str) -> tuple[EntryCheck, ...]:
        return tuple(check_entry(probe, name, index) for index in self.asked.get(name, ()))

    def _loss(self) -> Tensor:
        self.evaluations += 1
        self.before.rewind()
        return evaluate(self.closure)

    def _look(self, loss: Tensor) -> None:
        if loss.dtype in LIFT:
            raise TypeError(loss.dtype)
        self.has_graph = loss.requires_grad

    def _capture(self, mode: InDouble | None) -> list[Any]:
        """Every call of a module or custom Function in one run of the closure."""
        paths: dict[nn.Module, str] = dict(self.subject.module_paths())
        for module in modules_named_by(self.closure):
            for path, part in module.named_modules():
                paths.setdefault(part, path)
        bits = {id(tensor): 1 << i for i, tensor in enumerate(self.checked.values())}
        capture = Capture(paths, self.functions, self.operators, bits)
        self.before.rewind()
        with capture.listening():
            if mode is None:
                evaluate(self.closure)
            else:
                with mode:
                    evaluate(self.closure)
        return capture.calls

    def _with_names(self, layer: LayerCheck, call: Any) -> LayerCheck:
        if layer.passed:
            return layer
        upstream, own = (
            tuple(name for i, name in enumerate(self.checked) if bits >> i & 1)
            for bits in (call.upstream, call.own)
        )
        return replace(layer, upstream=upstream, own=own)

    def _step(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)

    def _result(
        self,
        tensors: dict[str, TensorCheck],
        findings: list[Any],
        probe: Probe | None,
        *,
        loss: float = 0.0,
        broken: Exception | None = None,
    ) -> GradientCheck:
        tensors = {
            name: tensors.get(name)
            or TensorCheck(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), _unchecked(t))
            for name, t in self.subject.tensors.items()
        }
        held = None if probe is None else probe.held
        concluded, statuses = conclude(tensors, self.layers, held, self.checked, broken)
        places = {n: finding.where for finding in reversed(concluded) for n in finding.names}
        tensors = {
            n: replace(t, status=statuses.get(n, t.status), where=places.get(n)) for n, t in tensors.items()
        }
        return GradientCheck(
            tensors,
            self.layers,
            [*findings, *concluded],
            aliases=self.subject.canonical,
            size=self.subject.size,
            everything=self.everything,
            loss=loss if probe is None else probe.here,
            evaluations=self.evaluations,
            seconds=time.perf_counter() - self.started,
            frozen=sum(not t.requires_grad for t in self.subject.tensors.values()),
            held=[] if held is None else list(held.places.values()),
            stopped=self.stopped,
        )


def _checkable(tensor: Tensor) -> bool:
    return (
        tensor.requires_grad
        and tensor.is_leaf
        and tensor.layout is torch.strided
        and not is_wrapper(tensor)
        and not tensor.is_meta
        and tensor.numel() > 0
    )


def _unchecked(tensor: Tensor) -> Any:
    """Of a tensor without entries, every entry is right."""
    return "unchecked" if tensor.numel() or not tensor.requires_grad else "passed"


def _weakest(verdicts: set[str]) -> Any:
    return next(v for v in ("kink", "unclear", "wrong") if v in verdicts)


def _finite(probe: Probe) -> bool:
    return math.isfinite(probe.here) and all(
        grad is None or bool(torch.isfinite(grad).all()) for grad in probe.gradients.values()
    )
