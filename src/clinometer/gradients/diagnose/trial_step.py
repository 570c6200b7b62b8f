"""One step of an optimizer, tried with this run's gradients and taken back: who moved, by what, and who did
not."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clinometer.distributed.ranks import Ranks
from clinometer.gradients.diagnose.loop_finding import loop_finding
from clinometer.gradients.optimizers.identity import has_own_step, option, shrinks_by, tensors_of
from clinometer.gradients.optimizers.made_nonfinite import made_nonfinite, without_coincidence
from clinometer.gradients.optimizers.state_fit import Moments, exchanged
from clinometer.gradients.report.finding import EXPLAINED, FAULT, Finding, Severity
from clinometer.gradients.report.formatting import format_number, shorten
from clinometer.gradients.sandbox.closure import Closure, evaluate
from clinometer.gradients.sandbox.sandbox import Before
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.trace.observed_run import ObservedRun, gradients_kept

_ERASES = 0.1
"""Weight decay that takes this share of every weight in one step leaves nothing for the gradient to do."""
_WAITS = 16
"""Steps that an optimizer may wait for, as one that accumulates does."""
_FASTER = 1e6
"""Times the learning rate: a step that was lost in rounding is not lost then."""
_SCALES = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3)
"""Moves against the gradient that are tried, as shares of the weights' norm."""
_GAIN = 1e-3
"""Of the loss: less, and the weights are at a minimum as far as their numbers go."""
_UNPUSHED = {
    "momentum": "zero_gradient_momentum",
    "both": "zero_gradient_both",
    "unknown": "zero_gradient_unknown",
}
_MOMENTS = ("exp_avg", "momentum_buffer", "m", "prev")


class TrialStep:
    """The step of one optimizer, and what it did to the tensors of the model."""

    def __init__(
        self,
        subject: Subject,
        run: ObservedRun,
        optimizer: Any,
        before: Before,
        ranks: Ranks,
        closure: Closure,
    ) -> None:
        self._subject, self._run, self._before, self._ranks = subject, run, before, ranks
        self._optimizer, self._closure = optimizer, closure
        self._held = tensors_of(optimizer)
        self._groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._ours = {name: t for name, t in subject.tensors.items() if id(t) in self._held}
        self._pushed: set[str] = set()
        """Tensors whose state held a moment of earlier gradients."""
        self._broken_state: dict[str, dict[str, Any]] = {}

    def findings(self) -> Iterator[Finding]:
        yield from self._state_of_another()
        yield from self._erasing()
        self._look_at_state()
        for parameter in self._held.values():
            if parameter.is_leaf and not parameter.requires_grad:
                old = self._before.grad_of(parameter)
                if old is not None:
                    parameter.grad = old  # the loop's step would meet it
        try:
            self._step()
        except Exception as error:
            text = f"{type(error).__name__}: {error}".partition("\n")[0]
            kind = type(self._optimizer).__name__
            yield loop_finding("trial-step", EXPLAINED, (), optimizer=kind, error=text[:200])
            return
        moved = self._moved()
        frozen = tuple(n for n, t in self._ours.items() if not t.requires_grad and n in moved)
        if frozen:
            yield loop_finding("moved-while-frozen", FAULT, frozen)
        broken = yield from self._not_finite(moved)
        yield from self._unpushed([n for n in moved if self._learns(n) and n not in broken])
        yield from self._still(moved)
        yield from self._erasing_on_its_own()

    def _step(self) -> None:
        # Without the hooks of the optimizer: what they report to must not see a step that is none.
        with torch.no_grad():
            inspect.unwrap(type(self._optimizer).step)(self._optimizer)

    def _moved(self) -> list[str]:
        here = {name for name, t in self._ours.items() if self._before.differs(t)}
        everywhere = self._ranks.named_by_any(here)
        return [name for name in self._ours if name in everywhere]

    def _learns(self, name: str) -> bool:
        return self._ours[name].requires_grad

    def _state(self, name: str) -> Mapping[str, Any]:
        state = getattr(self._optimizer, "state", {})
        found = state.get(self._ours[name], {}) if isinstance(state, Mapping) else {}
        return found if isinstance(found, Mapping) else {}

    def _look_at_state(self) -> None:
        for name in self._ours:
            state = self._state(name)
            if any(isinstance(m := state.get(key), Tensor) and bool((m != 0).any()) for key in _MOMENTS):
                self._pushed.add(name)
            if not all(bool(v.isfinite().all()) for v in state.values() if isinstance(v, Tensor)):
                self._broken_state[name] = {
                    k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()
                }

    def _state_of_another(self) -> Iterator[Finding]:
        if not self._ranks.alone:
            return
        kept = [
            Moments(name, t.grad, self._state(name), self._groups[id(t)])
            for name, t in self._ours.items()
            if t.is_leaf and t.grad is not None and self._state(name)
        ]
        if found := exchanged(kept):
            listed = shorten([f"{name} ← {other}" for name, other in found], 3)
            yield loop_finding("state-of-another", FAULT, tuple(name for name, _ in found), pairs=listed)

    def _erasing(self) -> Iterator[Finding]:
        """Groups whose weight decay takes more in a step than any gradient can give back."""
        for group in self._optimizer.param_groups:
            share = shrinks_by(self._optimizer, group)
            if share is None or not share >= _ERASES:
                continue
            ids = {id(p) for p in group["params"]}
            names = tuple(name for name, t in self._ours.items() if id(t) in ids and t.requires_grad)
            numbers: dict[str, Any] = {
                "lr": format_number(option(group, "lr")),
                "decay": format_number(option(group, "weight_decay")),
            }
            yield loop_finding("decay", FAULT, names, share=format_number(share, place=""), **numbers)

    def _erasing_on_its_own(self) -> Iterator[Finding]:
        """The same of an optimizer with a step of its own: its step is tried with gradients of zero and no
        state."""
        groups = self._optimizer.param_groups
        rates = {key for group in groups for key in group if "decay" in key and option(group, key) > 0}
        if not (rates and has_own_step(self._optimizer) and self._ranks.alone):
            return
        able = {name: t for name, t in self._ours.items() if t.grad is not None and t.requires_grad}
        kept = {name: t.grad for name, t in able.items()}
        old = {name: t.detach().clone() for name, t in able.items()}
        try:
            for t in able.values():
                t.grad = torch.zeros_like(t)
            self._optimizer.state.clear()
            self._step()
        except Exception:  # an optimizer that needs its state tells nothing
            return
        finally:
            for name, t in able.items():
                t.grad = kept[name]
        shares = {name: _share(old[name], t.detach() - old[name]) for name, t in able.items()}
        names = tuple(
            name
            for name, share in shares.items()
            if share >= _ERASES and _is_proportional(old[name], able[name].detach() - old[name], share)
        )
        if names:
            group = self._groups[id(able[names[0]])]
            decay = max(option(group, key) for key in rates)
            numbers: dict[str, Any] = {
                "lr": format_number(option(group, "lr")),
                "decay": format_number(decay),
            }
            share = format_number(max(shares[name] for name in names), place="")
            yield loop_finding("decay", FAULT, names, share=share, **numbers)

    def _not_finite(self, moved: list[str]) -> Iterator[Finding]:
        """What the step itself made NaN or infinite; returns the names."""
        made = {}
        for name in moved:
            tensor, old = self._ours[name], self._before.values_of(self._ours[name])
            if old is None or tensor.grad is None or not math.isfinite(self._run.sizes.get(name) or 0.0):
                continue
            # After the step a state may hold what the step made; only its dtypes are asked then.
            state = self._broken_state.get(name) or {
                key: torch.zeros_like(v) for key, v in self._state(name).items() if isinstance(v, Tensor)
            }
            if bool(tensor.isfinite().all()):
                continue
            found = made_nonfinite(old, tensor.grad, tensor.detach(), state, self._groups[id(tensor)])
            if found is not None:
                made[name] = found
        groups: dict[str, list[str]] = {}
        made = without_coincidence(made)
        for name, one in made.items():
            groups.setdefault(one.variant, []).append(name)
        for variant, names in groups.items():
            values = {"numbers": sum(made[n].count for n in names), **made[names[0]].values}
            kind = type(self._optimizer).__name__
            yield loop_finding(
                "step-not-finite", FAULT, tuple(names), variant=variant, optimizer=kind, **values
            )
        return set(made)

    def _unpushed(self, moved: list[str]) -> Iterator[Finding]:
        """Tensors and rows that moved though their gradient is zero: by how much, and by what."""
        whole: dict[str, list[str]] = {}
        shares: list[float] = []
        rows: dict[str, tuple[int, int, float]] = {}
        for name in moved:
            tensor, old, size = (
                self._ours[name],
                self._before.values_of(self._ours[name]),
                self._run.sizes[name],
            )
            if old is None or size is None or not math.isfinite(size):
                continue
            change = tensor.detach() - old
            if size == 0:
                cause = self._cause(name, old, change)
                whole.setdefault(cause, []).append(name)
                if cause == "decay":
                    shares.append(_share(old, change))
            elif tensor.dim() > 1 and tensor.grad is not None and tensor.grad.layout is torch.strided:
                empty = (tensor.grad == 0).flatten(1).all(1) & (change != 0).flatten(1).any(1)
                if bool(empty.any()) and (found := self._decaying(name, old[empty], change[empty])):
                    rows[name] = found[0], len(empty), found[1]
        if names := tuple(whole.pop("decay", ())):
            yield loop_finding(
                "decay", EXPLAINED, names, variant="tensors", share=format_number(max(shares), place="")
            )
        for cause, members in whole.items():
            yield loop_finding("moved-while-frozen", EXPLAINED, tuple(members), variant=_UNPUSHED[cause])
        if rows:
            values: dict[str, Any] = {
                "rows": sum(r for r, _, _ in rows.values()),
                "total": sum(n for _, n, _ in rows.values()),
            }
            share = format_number(max(s for _, _, s in rows.values()), place="")
            yield loop_finding("decay", EXPLAINED, tuple(rows), variant="rows", share=share, **values)

    def _decaying(self, name: str, old: Tensor, change: Tensor) -> tuple[int, float] | None:
        """How many of these rows, whose gradient is zero, move by weight decay alone, and by which share."""
        if option(self._groups[id(self._ours[name])], "weight_decay") == 0:
            return None
        if name not in self._pushed:
            return len(old), _share(old, change)
        # Rows that a moment of earlier batches moves too are not in proportion to themselves.
        old, change = old.flatten(1), change.flatten(1)
        size = old.double().square().sum(1).clamp(min=1e-300)
        shares = (-(change.double() * old.double()).sum(1) / size)[:, None]
        rounding = 4 * torch.finfo(change.dtype).eps * old.abs() + torch.finfo(change.dtype).tiny
        alone = ((change + shares * old).abs() <= rounding).all(1) & (shares[:, 0] > 0)
        return (int(alone.sum()), float(shares[alone].max())) if bool(alone.any()) else None

    def _cause(self, name: str, old: Tensor, change: Tensor) -> str:
        """ "decay", "momentum", "both" or "unknown": what moved numbers that have no gradient."""
        decays = option(self._groups[id(self._ours[name])], "weight_decay") != 0
        pushed = name in self._pushed
        if decays and pushed:
            return "decay" if _is_proportional(old, change, _share(old, change)) else "both"
        return "decay" if decays else "momentum" if pushed else "unknown"

    def _still(self, moved: list[str]) -> Iterator[Finding]:
        """Tensors with a gradient and a learning rate that the step left as they are, bit for bit."""
        sizes, rate = self._run.sizes, lambda name: self._groups[id(self._ours[name])].get("lr", 1.0)
        should = [n for n, t in self._ours.items() if t.requires_grad and sizes[n] and rate(n)]
        # A step of NaN says nothing about rounding: an optimizer may refuse it, and a weight be NaN already.
        should = [
            n for n in should if math.isfinite(sizes[n] or 0.0) and not self._is_rounding(self._ours[n])
        ]
        still = tuple(name for name in should if name not in moved)
        if not still:
            return
        scheduled = all("initial_lr" in self._groups[id(self._ours[name])] for name in still)
        severity: Severity = FAULT if len(still) == len(should) and not scheduled else EXPLAINED
        dtype = str(self._ours[still[0]].dtype).removeprefix("torch.")
        variant = ""
        if self._ranks.alone:
            variant = self._why_still(still)
            if variant == "later":
                return
        severity = EXPLAINED if variant else severity
        kind = type(self._optimizer).__name__
        yield loop_finding("never-moves", severity, still, variant=variant, dtype=dtype, optimizer=kind)

    def _why_still(self, still: tuple[str, ...]) -> str:
        """ "": the step is lost in rounding; "later": it waits; "waits"; "minimum": no step would help."""
        if self._at_minimum(still):
            return "minimum"
        if isinstance(self._optimizer, Optimizer) and not has_own_step(self._optimizer):
            return ""  # torch's own takes its step each time it is asked
        with suppress(Exception):
            for _ in range(_WAITS):
                self._step()
                if any(self._before.differs(self._ours[name]) for name in still):
                    return "later"
            for group in self._optimizer.param_groups:
                group["lr"] = option(group, "lr") * _FASTER
            for _ in range(_WAITS):
                self._step()
                if any(self._before.differs(self._ours[name]) for name in still):
                    return ""
        return "waits"

    def _at_minimum(self, still: tuple[str, ...]) -> bool:
        """Whether no move against the gradient lowers the loss, however large: tried, and taken back."""
        tensors = [self._ours[name] for name in still]
        grads = [
            t.grad.detach().clone() for t in tensors if t.grad is not None and t.grad.layout is torch.strided
        ]
        if len(grads) < len(tensors) or any(t.is_complex() for t in tensors):
            return False
        old = [t.detach().clone() for t in tensors]
        size = math.sqrt(sum(float(t.double().square().sum()) for t in old))
        push = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        sign = 1.0 if self._groups[id(tensors[0])].get("maximize") else -1.0
        size = max(size, 0.01 * math.sqrt(sum(t.numel() for t in old)))
        losses: list[float] = []
        try:
            with gradients_kept(self._subject):
                for scale in (0.0, *_SCALES):
                    with torch.no_grad():
                        for t, before, g in zip(tensors, old, grads, strict=True):
                            t.copy_(before).add_(g.to(t.dtype), alpha=sign * scale * size / push)
                    self._before.rewind()
                    losses.append(sign * -float(evaluate(self._closure).detach()))
        except Exception:  # a closure that cannot be run twice
            return False
        finally:
            with torch.no_grad():
                for t, before in zip(tensors, old, strict=True):
                    t.copy_(before)
        first, *others = [value for value in losses if math.isfinite(value)] or [0.0]
        eps = max(torch.finfo(t.dtype).eps for t in tensors)
        noise = 4 * eps * max(map(abs, losses), default=0.0)
        return bool(others) and first - min(others) <= max(_GAIN * abs(first), noise)

    def _is_rounding(self, tensor: Tensor) -> bool:
        """Whether its gradient cancels by construction, so that it need not move."""
        flow = self._run.flow
        return flow is not None and flow.graph.leaves.get(id(tensor)) in flow.cancelled


def _share(old: Tensor, change: Tensor) -> float:
    """c of change = −c · old, by least squares."""
    wide = old.double().flatten()
    return -float(change.double().flatten() @ wide) / (float(wide @ wide) or 1.0)


def _is_proportional(old: Tensor, change: Tensor, share: float) -> bool:
    """Whether change = −share · old within rounding."""
    unit = torch.finfo(change.dtype).eps * old.abs() + torch.finfo(change.dtype).tiny
    return bool(((change + share * old).abs() <= 4 * unit).all())
