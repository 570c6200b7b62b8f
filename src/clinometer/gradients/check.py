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
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from clinometer.gradients.capture import Capture
from clinometer.gradients.closure import Closure, eagerly, evaluate
from clinometer.gradients.conclusions import conclude, not_finite, not_repeatable
from clinometer.gradients.differences import DIRECTIONS, Judgement
from clinometer.gradients.double import LIFT, InDouble, in_double
from clinometer.gradients.layers import LayerCheck, check_call
from clinometer.gradients.localise import EntryCheck, check_entry, localise
from clinometer.gradients.own_precision import OwnGradients, check_at_own_precision
from clinometer.gradients.probe import NotRepeatable, Probe
from clinometer.gradients.ranks import Ranks
from clinometer.gradients.subject import Subject
from clinometer.gradients.untouched import Before, modules_named_by, untouched
from clinometer.gradients.verdict import GradientCheck, TensorCheck
from clinometer.messages import InputError

MOST_NARROWED = 6
Progress = Callable[[int, int], None]
Indices = Mapping[str, Sequence[int | tuple[int, ...]]]


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
    `progress(done, total)` is called as it goes. Leaves no trace. Under DDP each rank checks its own loss.

    Raises InputError for what is no set of tensors or no loss, and for sharded tensors; UnknownName for a
    name in `entries`.
    """
    subject = Subject.of(params)
    ranks = Ranks(subject.tensors, [m for m in (subject.module, *modules_named_by(closure)) if m is not None])
    ranks.refuse_sharded("check.sharded")
    asked = {subject.name_of(key): [_index(i) for i in value] for key, value in (entries or {}).items()}
    with (
        ranks.apart(),
        untouched(subject, closure=closure) as before,
        eagerly(),
        sdpa_kernel(SDPBackend.MATH),
    ):
        return _Check(subject, closure, before, seed, asked, progress or (lambda done, total: None)).run()


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
    done: int = 0
    total: int = 0

    def run(self) -> GradientCheck:
        self.started = time.perf_counter()
        subject = self.subject
        self.checked = {n: t for n, t in subject.tensors.items() if _checkable(t)}
        own = OwnGradients.of(self.closure, self.checked, self.before)
        self.functions = own.functions
        modules = dict.fromkeys([m for m in [subject.module, *modules_named_by(self.closure)] if m])
        also = [p for module in modules for p in module.parameters()]
        with in_double([*self.checked.values(), *also]) as (mode, doubled):
            self.mode, self.doubled = mode, doubled
            probe = Probe(self._loss, self.checked, mode, doubled)
            try:
                probe.begin(look=self._look)
            except NotRepeatable:
                if not math.isfinite(probe.here):  # NaN differs from itself: no sign of randomness
                    return self._result({}, [not_finite(probe.here)], probe)
                return self._result({}, [not_repeatable(self._loss, mode)], probe)
            except InputError:
                raise
            except Exception as error:  # it ran at its own precision, so float64 is what it cannot do
                broken = error
            else:
                return self._ladder(probe, own)
        self.layers = check_at_own_precision(self._capture(None), self.before.rewind, self.seed)
        return self._result({}, [], None, loss=own.loss, broken=broken)

    def _ladder(self, probe: Probe, own: OwnGradients) -> GradientCheck:
        if not _finite(probe):
            return self._result({}, [not_finite(probe.here)], probe)
        calls = self._capture(self.mode)
        self.total = 1 + len(self.checked) + len(calls)
        self.everything = probe.judge_everything(self.seed)
        self._step()
        tensors = {}
        for position, name in enumerate(self.checked):
            tensors[name] = self._tensor(probe, name, self.seed + 7 * (position + 1), own)
            self._step()
        for position, call in enumerate(calls):
            found = check_call(call, self.mode, self.doubled, self.before.rewind, self.seed + position)
            if found is not None:
                self.layers.append(found)
            calls[position] = None  # its inputs are not needed any more
            self._step()
        self._narrow(probe, tensors)
        return self._result(tensors, [], probe)

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

    def _entries(self, probe: Probe, name: str) -> tuple[EntryCheck, ...]:
        return tuple(check_entry(probe, name, index) for index in self.asked.get(name, ()))

    def _loss(self) -> Tensor:
        self.evaluations += 1
        self.before.rewind()
        return evaluate(self.closure)

    def _look(self, loss: Tensor) -> None:
        if loss.dtype in LIFT:
            raise TypeError(loss.dtype)

    def _capture(self, mode: InDouble | None) -> list[Any]:
        """Every call of a module or custom Function in one run of the closure."""
        paths: dict[nn.Module, str] = dict(self.subject.module_paths())
        for module in modules_named_by(self.closure):
            for path, part in module.named_modules():
                paths.setdefault(part, path)
        capture = Capture(paths, self.functions)
        self.before.rewind()
        with capture.listening():
            if mode is None:
                evaluate(self.closure)
            else:
                with mode:
                    evaluate(self.closure)
        return capture.calls

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
        )


def _checkable(tensor: Tensor) -> bool:
    return (
        tensor.requires_grad
        and tensor.is_leaf
        and tensor.layout is torch.strided
        and not is_traceable_wrapper_subclass(tensor)
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
