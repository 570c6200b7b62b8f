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
from clinometer.gradients.check.circumstances import HooksOff, reasons_to_try
from clinometer.gradients.check.findings import (
    accounted_for,
    accumulated_by_hooks,
    conclude,
    divided,
    no_gradient,
    no_graph,
    not_finite,
    not_repeatable,
)
from clinometer.gradients.check.layer_checks import APPROXIMATE, LayerCheck, check_call
from clinometer.gradients.check.localise import EntryCheck, check_entry, largest_share, localise
from clinometer.gradients.check.numerics.finite_differences import DIRECTIONS, Judgement
from clinometer.gradients.check.numerics.float64 import LIFT, InDouble, in_double
from clinometer.gradients.check.numerics.perturbation import NotRepeatable, Probe
from clinometer.gradients.check.operation_checks import OperationChecks
from clinometer.gradients.check.own_precision import CANCELS, OwnGradients, check_at_own_precision
from clinometer.gradients.check.reason_search import TriedReason, search
from clinometer.gradients.check.result import GradientCheck, TensorCheck
from clinometer.gradients.report.places import Where
from clinometer.gradients.sandbox.closure import Closure, evaluate
from clinometer.gradients.sandbox.interrupts import uninterrupted
from clinometer.gradients.sandbox.sandbox import Before, modules_named_by, untouched
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.trace.circumstances import in_order, run_eagerly
from clinometer.gradients.trace.function_calls import function_calls
from clinometer.gradients.trace.holders import find_holders
from clinometer.gradients.trace.observed_run import can_be_explained, observe
from clinometer.messages import InputError
from clinometer.torch_internals.tensors import is_wrapper
from clinometer.torch_support import offers

MOST_NARROWED = 6
COULD_FAIL = 1e-2
"""Of ‖g⊙v‖₂: an error above it does not pass, however much rounding allows for."""
Progress = Callable[[int, int], None]
Indices = Mapping[str, Sequence[int | tuple[int, ...]]]


@uninterrupted
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
        run_eagerly(subject.compiled) as circumstances,
        sdpa_kernel(SDPBackend.MATH),
    ):
        result = _Check(subject, closure, before, seed, asked, quiet).run()
        result.findings = tuple(in_order([*circumstances.findings(closure, before), *result.findings]))
        return result


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
    reasons: list[TriedReason] = field(default_factory=list)
    accumulated: dict[str, Where | None] = field(default_factory=dict)
    """Tensors whose gradient a hook accumulates, and where it was registered."""
    functions: list[type] = field(default_factory=list)
    operators: dict[str, Any] = field(default_factory=dict)
    computed: str = ""
    done: int = 0
    total: int = 0
    has_graph: bool = True
    stopped: list[Where] = field(default_factory=list)

    def run(self) -> GradientCheck:
        try:
            return self._run()
        except InputError as error:
            if error.key == "check.graph_used_up":
                self._raise_its_own()
            raise

    def _run(self) -> GradientCheck:
        self.started = time.perf_counter()
        subject = self.subject
        self.checked = {n: t for n, t in subject.tensors.items() if _checkable(t)}
        if any(h.tensor.grad_fn is not None for h in find_holders(subject.module, self.closure).values()):
            older = observe(subject, self.closure, self.before, Ranks(subject.tensors)).older
            if older is not None and older.live:
                return self._result({}, [older.finding()], None)
        try:
            own = OwnGradients.of(self.closure, self.checked, self.before)
        except (RuntimeError, IndexError) as error:
            if isinstance(error, IndexError) or can_be_explained(error):
                self._raise_its_own()
            raise
        self.functions, self.operators, self.computed = own.functions, own.operators, own.computed
        modules = dict.fromkeys(
            [m for m in [subject.module, *modules_named_by(self.closure)] if m is not None]
        )
        also = [p for module in modules for p in module.parameters()]
        self.before.rewind_frozen()
        with in_double([*self.checked.values(), *also], self.before.puts_back) as (mode, doubled):
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
        self._accumulate(probe)
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
        self._explain(probe, tensors)
        self._narrow(probe, tensors)
        absent = [name for name, tensor in tensors.items() if tensor.status == "no-gradient"]
        findings = no_gradient(absent, cut, len(tensors))
        findings += accumulated_by_hooks(tensors, self.accumulated)
        findings += divided(tensors, self.checked, own.divided)
        self.stopped = probe.stopped(self.seed)
        return self._result(tensors, findings, probe)

    def _accumulate(self, probe: Probe) -> None:
        """Gradients that a hook accumulates by a backward of its own: no graph of the loss reaches them."""
        if not probe.unreached:
            return
        hooks = HooksOff({})
        try:
            with hooks.listening():
                found = probe.accumulated()
        except Exception:  # then there is no such gradient to compare
            return
        for name in [name for name in self.checked if name in probe.unreached]:
            if hooks.called and found[name] is not None:
                probe.gradients[name] = found[name]
                self.accumulated[name] = next(iter(hooks.called.values()))
        probe.unreached -= self.accumulated.keys()

    def _explain(self, probe: Probe, tensors: dict[str, TensorCheck]) -> None:
        """Why wrong gradients are wrong where no custom Function accounts for it: by trying."""
        wrong = [name for name, tensor in tensors.items() if tensor.status == "wrong"]
        near = self._approximate(probe, tensors, wrong)
        known = accounted_for(self.layers, wrong)
        if any(layer.share for layer in self.layers):
            known |= set(near)
        if left := [name for name in wrong if name not in known]:
            left.sort(key=lambda name: -tensors[name].share)
            tries = reasons_to_try(self.checked, self.functions, probe.held)
            self.reasons, left = search(probe, left, tries, self.seed)
            if not left:  # what a layer measured with these hooks and checkpoints is not its own
                self.layers = [layer for layer in self.layers if layer.passed or layer.function]
        left = [name for name in left if name not in near]
        solved = {name for reason in self.reasons for name in reason.names}
        for name in near:
            if name not in solved:
                tensors[name] = replace(tensors[name], status="approximate")
        if left or any(layer.share and not layer.function and layer.where for layer in self.layers):
            self.layers += self._operations()
        known = accounted_for(self.layers, wrong)
        if any(name not in known for name in left):
            self.layers += self._second_derivatives(probe)
            known = accounted_for(self.layers, wrong)
        for name in left:
            if probe.held.unheld and name not in known:
                tensors[name] = replace(tensors[name], status="unclear", reason="vmap")

    def _approximate(
        self, probe: Probe, tensors: Mapping[str, TensorCheck], wrong: Sequence[str]
    ) -> list[str]:
        """Those of the wrong tensors whose error is small, and as small in every part."""
        if any(not layer.passed for layer in self.layers):
            return []
        near = [name for name in wrong if tensors[name].share <= APPROXIMATE]
        if any(layer.share for layer in self.layers):
            return near
        generator = torch.Generator().manual_seed(self.seed)
        return [
            name
            for name in near[:MOST_NARROWED]
            if largest_share(probe, name, tensors[name].step, generator) <= APPROXIMATE
        ]

    def _operations(self) -> list[LayerCheck]:
        """The calls of torch whose own derivative is another, each checked alone while the closure runs."""
        checks = OperationChecks(self.mode, self._paths(), self._bits(), self.seed)
        self.before.rewind()
        try:
            with checks.listening():
                evaluate(self.closure)
        except Exception:  # a closure that cannot be listened to so: nothing is found
            return []
        return [
            replace(layer, upstream=self._named(upstream))
            for layer, upstream in zip(checks.found, checks.upstream, strict=True)
        ]

    def _second_derivatives(self, probe: Probe) -> list[LayerCheck]:
        """Custom Functions whose backward, differentiated once more, gives another derivative."""
        found = []
        for call in self._capture(self.mode) if probe.held.differentiates else []:
            if isinstance(call.target, type):
                rewind = self.before.rewind
                layer = check_call(call, self.mode, self.doubled, rewind, self.seed, second=True)
                if layer is not None and not layer.passed:
                    found.append(self._with_names(layer, call))
        return found

    def _named(self, bits: int) -> tuple[str, ...]:
        return tuple(name for i, name in enumerate(self.checked) if bits >> i & 1)

    def _narrow(self, probe: Probe, tensors: dict[str, TensorCheck]) -> None:
        """Look inside the wrong tensors that say most: a failing layer's own, then the farthest off.

        A wrong backward spoils every tensor before it, and each costs some hundred evaluations.
        """
        own = {f"{layer.path}.{part}".lstrip(".") for layer in self.layers for part in layer.wrong_parts}
        solved = {name for reason in self.reasons for name in reason.names}
        wrong = [t for t in tensors.values() if t.status == "wrong" and t.name not in solved]
        wrong.sort(key=lambda tensor: (tensor.name not in own, -tensor.error / tensor.tolerance))
        for position, tensor in enumerate(wrong[:MOST_NARROWED]):
            least = 0.05 * tensor.error if abs(tensor.jump) > 0.01 * tensor.error else 0.0
            narrowed = localise(probe, tensor.name, tensor.step, least, self.seed + position)
            tensors[tensor.name] = replace(tensor, narrowed=narrowed)

    def _tensor(self, probe: Probe, name: str, seed: int, own: OwnGradients) -> TensorCheck:
        tensor = self.checked[name]
        generator = torch.Generator().manual_seed(seed)
        judged: list[Judgement] = []
        probe.held.active &= name not in self.accumulated  # its gradient is that of values without a graph
        for _ in range(DIRECTIONS):
            judged.append(probe.judge({name: probe.direction(name, generator)}))
            if judged[-1].verdict == "passed":
                break
        probe.held.active |= name in self.accumulated
        last = judged[-1]
        verdicts = {one.verdict for one in judged}
        status = last.verdict if len(verdicts) == 1 or last.verdict == "passed" else _weakest(verdicts)
        if status == "passed" and probe.gradients[name] is None:
            status = "no-gradient"
        reason = ""
        if status == "passed" and self._hidden(last):
            status, reason = "unclear", "rounding"
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
            scale=last.scale,
            reason=reason,
        )

    def _hidden(self, judged: Judgement) -> bool:
        """Whether a gradient that is far off would have passed as well, as rounding allows for so much.

        One that cancels by construction, as that of a key's bias, is nothing but rounding.
        """
        whole = 0.0 if self.everything is None else self.everything.scale
        return judged.scale > CANCELS * whole and abs(judged.error) > COULD_FAIL * judged.scale

    def _without_gradient(self, name: str, own: OwnGradients) -> TensorCheck:
        shape = tuple(self.checked[name].shape)
        return TensorCheck(name, shape, own.dtypes[name], "no-gradient", has_gradient=False)

    def _entries(self, probe: Probe, name: str) -> tuple[EntryCheck, ...]:
        return tuple(check_entry(probe, name, index) for index in self.asked.get(name, ()))

    def _loss(self) -> Tensor:
        self.evaluations += 1
        self.before.rewind()
        self.doubled.put_back(self.mode.written.values())
        self.mode.written = {}
        return evaluate(self.closure)

    def _look(self, loss: Tensor) -> None:
        if loss.dtype in LIFT:
            raise TypeError(loss.dtype)
        self.has_graph = loss.requires_grad

    def _capture(self, mode: InDouble | None) -> list[Any]:
        """Every call of a module or custom Function in one run of the closure."""
        capture = Capture(self._paths(), self.functions, self.operators, self._bits())
        self.before.rewind()
        with capture.listening():
            if mode is None:
                evaluate(self.closure)
            else:
                with mode:
                    evaluate(self.closure)
        return capture.calls

    def _paths(self) -> dict[nn.Module, str]:
        paths: dict[nn.Module, str] = dict(self.subject.module_paths())
        for module in modules_named_by(self.closure):
            for path, part in module.named_modules():
                paths.setdefault(part, path)
        return paths

    def _bits(self) -> dict[int, int]:
        return {id(tensor): 1 << i for i, tensor in enumerate(self.checked.values())}

    def _with_names(self, layer: LayerCheck, call: Any) -> LayerCheck:
        if layer.passed:
            return layer
        return replace(layer, upstream=self._named(call.upstream), own=self._named(call.own))

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
        concluded, statuses = conclude(
            tensors, self.layers, held, broken, self.reasons, computed=self.computed
        )
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
