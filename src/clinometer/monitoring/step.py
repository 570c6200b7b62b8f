"""What a watch knows between two steps, and how the numbers of a step come together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clinometer.distributed.ranks import refuse_flattened
from clinometer.distributed.sharded_tensors import is_sharded, rank, version
from clinometer.gradients.report.formatting import shorten
from clinometer.gradients.step.explain_step import innermost
from clinometer.monitoring.alert_diagnosis import diagnose_now
from clinometer.monitoring.alerts.alerts import Alerts
from clinometer.monitoring.alerts.facts import Tensors, facts_of
from clinometer.monitoring.environment import environment, memory_in_use
from clinometer.monitoring.listen.discarded import DiscardedBackwards
from clinometer.monitoring.listen.loss_scale import LossScale, Scaling
from clinometer.monitoring.listen.losses import Losses
from clinometer.monitoring.listen.outside_parameters import OutsideParameters
from clinometer.monitoring.listen.zero_grad import Chains
from clinometer.monitoring.measure.noise_scale import FirstMicroBatch
from clinometer.monitoring.measure.pins import Pins
from clinometer.monitoring.measure.shard_measures import Shards
from clinometer.monitoring.measure.small_tensors import Gradients
from clinometer.monitoring.measure.statistics import Scratch
from clinometer.monitoring.measure.step_row import StepRow, refresh
from clinometer.monitoring.measure.watched_tensors import Roster, describe, order_of_use
from clinometer.monitoring.measure.writes_between import WritesBetween
from clinometer.monitoring.sinks import SinkGroup
from clinometer.vocabulary import STATISTICS

HISTOGRAMS_EVERY = 16
OUTSIDE_AFTER = 4
"""Steps after which parameters outside the model that nothing moved are reported."""
NEVER_STEPPED = 1000
"""Backwards without any step that are an alert while the watch lives."""
FEWEST_BACKWARDS = 3
"""Backwards without any step that are an alert when the watch is closed."""


class Phase(Enum):
    """Where a watch is between two steps.

        WAITING ──▶ OPEN ──every optimizer stepped──▶ COMPLETE ──flush──▶ REPORTED
                     ▲                                   │                   │
                     └────────── the next step ──────────┴───────────────────┘

    A step opens when its gradients are first clipped, or when an optimizer's step begins. COMPLETE is not yet
    REPORTED, because the loop may still log numbers of the step, and a GPU may still compute them: a step is
    reported when the next one opens, or by `flush`.
    """

    WAITING = "no step was seen yet"
    OPEN = "gradients are clipped and read, optimizers step"
    COMPLETE = "every optimizer has stepped; the sinks do not know the step yet"
    REPORTED = "the sinks know the step"


class DiagnosisPhase(Enum):
    """diagnose() runs once, at the first gradient with NaN or Inf: NOT_RUN ──▶ RUNNING ──▶ DONE."""

    NOT_RUN = "no gradient was NaN or Inf, or there is no closure"
    RUNNING = "its own forward and backward are heard, and ignored"
    DONE = "its report was written"


class StepWatch:
    """The handlers of a watch. Watch calls each of them guarded, under no_grad and without autocast."""

    def __init__(self, model: Any, optimizers: Sequence[Optimizer], sinks: SinkGroup, every: int) -> None:
        if isinstance(model, nn.Module):
            refuse_flattened(model.modules())
        self.roster = Roster(model, optimizers)
        self._versions = {id(tensor): version(tensor) for tensor in self._living()}
        self.shards = Shards(self.roster, every)
        self._first_batch = FirstMicroBatch(self.roster, self.shards)
        if not self.shards.writes or (self._first_batch.replicated and rank() != 0):
            sinks.sinks.clear()  # the same numbers on every rank: the first alone writes
        self.sinks = sinks
        self.every = every
        self.step = 0
        self.closure: Callable[[], Any] | None = None
        self.pins = Pins()
        self.alerts = Alerts(self.sinks.alert)
        self._phase = Phase.WAITING
        self._diagnosis = DiagnosisPhase.NOT_RUN
        self._losses = Losses()
        self._chains = Chains(self.roster)
        self._discarded = DiscardedBackwards(self.roster)
        self._writes: dict[int, WritesBetween] = {}
        self._outside = OutsideParameters()
        self._backwards = 0
        """Backwards that reached the watched tensors, while no step was ever seen."""
        self._scale = LossScale()
        self._scratch, self._small_gradients = Scratch(), Gradients()
        self._row: StepRow | None = None
        """The step under way, or the last one until the next opens; None while WAITING."""
        self._unmeasured: set[int] = set()
        """Ids of the optimizers that have stepped since their weights were measured."""
        self._step_began: set[int] = set()
        """Ids of the optimizers whose step() was called since the scaler was asked to step them."""
        self._described: list[dict[str, Any]] = []
        self._known: Tensors | None = None
        self._positions: dict[int, int] = {}
        self._last_time: float | None = None
        self._comes_before: dict[str, bool] = {}
        """For each name that the loop logs: whether it comes before the step it belongs to."""
        self._next_scalars: dict[str, Any] = {}
        self._next_batch: dict[str, Any] | None = None

    # The run as a whole.

    def begin(self, config: dict[str, Any]) -> None:
        model = self.roster.model
        name = str(config.pop("name", None) or type(model).__name__)
        run = {"name": name, "started": time.time(), "config": config, "environment": environment()}
        run |= {"statistics": list(STATISTICS), "every": self.every, "model": type(model).__name__}
        run["optimizers"] = [type(o).__name__ for o in self.roster.living()]
        self.sinks.begin(run)

    def let_go(self) -> None:
        """Free the copies of the weights, and drop the closure."""
        for one in self.roster.watched:
            one.before = one.room = None
        self._row, self._phase, self.closure = None, Phase.WAITING, None

    def leave(self, reason: str) -> None:
        """This rank watches no longer; other ranks of the same sharded tensors do not wait for it."""
        self.shards.leave(reason)

    def event(self, kind: str, data: dict[str, Any]) -> None:
        self.sinks.event(self.step, time.time(), kind, data)

    def log(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            number = value.detach() if isinstance(value, Tensor) else float(value)
            row = self._row_of_logged(name)
            (self._next_scalars if row is None else row.scalars)[name] = number

    def log_batch(self, identity: dict[str, Any]) -> None:
        row = self._row_of_logged("batch")
        if row is None:
            self._next_batch = identity
        else:
            row.batch = identity

    def _row_of_logged(self, name: str) -> StepRow | None:
        """The row that a logged value belongs to; None for the step that follows."""
        before = self._comes_before.setdefault(name, self._phase is Phase.WAITING)
        if self._phase is Phase.OPEN or not (before or self._losses.parts):
            return self._row
        return None

    # Around the optimizer's step.

    def before_step(self, optimizer: Optimizer) -> None:
        self._step_began.add(id(optimizer))
        row = self._row_for(optimizer)
        self._read_writes(row, optimizer)
        self._read(row, optimizer)

    def before_closure(self, optimizer: Optimizer) -> None:
        self._step_began.add(id(optimizer))
        # Now, and not when the closure has run: an optimizer may try other weights in it.
        self._read_writes(self._row_for(optimizer), optimizer)

    def closure_ran(self, optimizer: Optimizer) -> None:
        row = self._open_row()
        if row is not None and id(optimizer) not in row.stepped:
            if id(optimizer) not in row.read_for:
                self._read(row, optimizer)
            self._losses.take()  # later evaluations of the closure are not part of the loss

    def after_step(self, optimizer: Optimizer) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer skips by itself
        self._stepped(optimizer, taken=found_inf is None or not bool(torch.as_tensor(found_inf).any()))

    def skip(self) -> None:
        for optimizer in self.roster.living():
            self._read(self._row_for(optimizer), optimizer)
            self._stepped(optimizer, taken=False)

    def _open_row(self) -> StepRow | None:
        """The row of the step under way; None if no step is open."""
        return self._row if self._phase is Phase.OPEN else None

    def _row_for(self, optimizer: Optimizer) -> StepRow:
        """The row of the step under way; a new one if this optimizer has already stepped in it."""
        row = self._open_row()
        if row is not None and id(optimizer) in row.stepped:
            self._complete(row)
        return self._row_in_hand()

    def _row_in_hand(self) -> StepRow:
        """The row of the step under way; a new one if no step is open."""
        row = self._open_row()
        if row is not None:
            return row
        self.flush()
        return self._begin_row()

    def _begin_row(self) -> StepRow:
        number = self.step + 1
        if self.roster.grew(look=number % HISTOGRAMS_EVERY == 0):
            self.shards.agree()
        measured = (number - 1) % self.every == 0
        # The same steps however often the run is stopped and resumed.
        before = number - self.every
        histograms = measured and (number - 1) // HISTOGRAMS_EVERY > (before - 1) // HISTOGRAMS_EVERY
        self.pins.forget()
        self._row = row = StepRow(number, self.roster.watched, measured=measured, histograms=histograms)
        self._phase = Phase.OPEN
        row.scalars.update(self._next_scalars)
        row.batch = self._next_batch
        self._next_scalars, self._next_batch = {}, None
        return row

    def _read(self, row: StepRow, optimizer: Optimizer) -> None:
        first = not row.read_for
        row.piled_up |= self._chains.unbroken(optimizer)
        discarded, backwards = self._discarded.stepped()
        row.discarded, row.backwards = row.discarded + discarded, row.backwards + backwards
        row.read_for.add(id(optimizer))
        row.parts = max(row.parts, self._losses.parts)
        loss = self._losses.take()
        if loss is not None:
            row.losses.append(loss)
        if not row.measured:
            return
        if self.roster.grew():
            self.shards.agree()
            row.widen(self.roster.watched)
        owned, places = self.roster.owned_by(optimizer), self._small_gradients.places
        elsewhere = refresh(owned, places, stepped=id(optimizer) in self._unmeasured)
        if elsewhere:
            self.roster.compare_memory()
        self._unmeasured.discard(id(optimizer))
        if first:  # apart, because another optimizer may be the first of the next round
            refresh(self.roster.unowned, places)
        watched = [*owned, *(self.roster.unowned if first else ())]
        self._read_gradients(row, watched, getattr(optimizer, "grad_scale", None))
        self.pins.before(optimizer)
        if not self._scale.is_used and self._may_diagnose() and self.shards.any(row.nonfinite()):
            self._diagnose()

    def _read_writes(self, row: StepRow, optimizer: Optimizer) -> None:
        if self.every == 1 and not self.shards.active:
            if id(optimizer) not in self._writes:
                self._writes[id(optimizer)] = WritesBetween(self.roster.owned_by(optimizer))
            row.write = self._writes[id(optimizer)].step_begins() or row.write

    def _read_gradients(self, row: StepRow, watched: list[Any], scale: Any) -> None:
        read = row.read_gradients(watched, self.roster.living(), self._scratch, self._small_gradients)
        if scale is not None and read:  # a fused optimizer takes the scale off by itself
            row.scales.append((read, torch.as_tensor(scale).clone()))

    def _stepped(self, optimizer: Optimizer, *, taken: bool) -> None:
        row = self._open_row()
        if row is None:
            return
        row.taken = row.taken and taken
        if row.measured:
            first = not row.stepped
            row.read_weights(
                [*self.roster.owned_by(optimizer), *(self.roster.unowned if first else ())],
                self._scratch,
            )
            self.pins.after(optimizer)
        else:
            self._unmeasured.add(id(optimizer))
        row.stepped.add(id(optimizer))
        if id(optimizer) in self._writes:
            self._writes[id(optimizer)].step_ended()
        self._chains.stepped(optimizer)
        self.step = row.step
        if all(id(o) in row.stepped for o in self.roster.living()):
            self._complete(row)

    def _complete(self, row: StepRow) -> None:
        """OPEN → COMPLETE: add what is known without waiting for a device."""
        self._phase = Phase.COMPLETE
        row.time = time.time()
        now = time.perf_counter()
        if self._last_time is not None:
            row.scalars.setdefault("seconds", now - self._last_time)
        self._last_time = now
        rates = [group.get("lr") for o in self.roster.living() for group in o.param_groups]
        row.scalars |= {f"lr.{i}" if i else "lr": rate for i, rate in enumerate(rates) if rate is not None}
        if row.losses:
            row.scalars.setdefault("loss", sum(row.losses))
        if (memory := memory_in_use(row.device)) is not None:
            row.scalars["memory"] = memory
        if (scale := self._scale.value()) is not None:
            row.scalars["grad_scale"] = scale
        self._first_batch.step_complete(row)
        self._scale.step_complete()
        if row.device is None:  # the numbers of a GPU are sent when they have arrived
            self.shards.send(row, self.pins, self.closure)

    def flush(self) -> None:
        """COMPLETE → REPORTED: pass the last complete step to the sinks and to the alert rules."""
        row = self._row
        if row is None or self._phase is not Phase.COMPLETE:
            return
        self._phase = Phase.REPORTED
        if not row.measured:
            return
        self.shards.receive(row, self.pins, self.closure)
        row.finish()
        self._first_batch.add_noise_scale(row)
        self._describe()
        statistics = row.statistics.astype("float32")
        self.sinks.step(row.step, row.time, row.scalars, statistics)
        if row.counts is not None:
            self.sinks.histograms(row.step, row.counts)
        if pinned := self.pins.take(row.scalars.get("clip", 1.0)):
            self.sinks.weights(row.step, pinned)
        if self._known is None or len(self._known.names) != len(row.statistics):
            self._known = Tensors.of(self.roster, self._described[: len(row.statistics)])
        self.alerts.look(facts_of(row, self.roster, self._known))
        if self.alerts.seen == OUTSIDE_AFTER:
            self._report_outside()

    def _describe(self) -> None:
        if len(self._described) < len(self.roster.watched):
            self._described = describe(self.roster.watched, self.roster.groups(), self._positions)
            self.sinks.tensors(self._described)

    # What torch's functions report (listen/torch_calls.py). The calls of our own diagnosis are ignored.

    def backward_begins(self, losses: Sequence[Tensor]) -> None:
        if self._diagnosis is DiagnosisPhase.RUNNING:
            return
        if not self._positions:
            self._positions = order_of_use(losses, self.roster.watched, self.shards.stand_ins())
        self._chains.backward_begins()
        self._discarded.backward_begins(losses)
        if not self.shards.active:
            self._outside.look(losses, self.roster)
        self._losses.begins([*self.roster.tensors(), *self.shards.gathered_parameters()])

    def backward_failed(self) -> None:
        self._losses.failed()

    def backward_ended(self, losses: Sequence[Tensor], given: Any) -> None:
        if self._diagnosis is DiagnosisPhase.RUNNING:
            return
        tensors = self.roster.tensors()
        self._chains.backward_ended()
        scale = self._scale.of_loss()
        reached = [*tensors, *self.shards.gathered_parameters()]
        if not self._losses.ended(reached, losses, given, scale, own=len(tensors)):
            return
        self.shards.backwards += self._losses.reduced
        self._discarded.backward_ended()
        self._backwards += 1
        if self._phase is Phase.WAITING and self._backwards == NEVER_STEPPED:
            self._never_stepped()
        row = self._open_row()
        if row is not None:
            row.read.clear()  # what was measured when values were clipped is out of date
        self._first_batch.backward_ended(self.step, self._losses.parts, clean=self._losses.clean)

    def clipping(self, grads: Iterable[Tensor], total_norm: Any, max_norm: float) -> None:
        row, indices = self._row_of(grads)
        if row is None or self._diagnosis is DiagnosisPhase.RUNNING:
            return
        row.clipped = True
        row.clipped_while_scaled |= self._scale.phase is Scaling.SCALED
        if is_sharded(total_norm):
            # Its value is known when all ranks have sent their part. Measured now, no value is needed.
            self._read_before_change(row)
            if max_norm < math.inf:
                row.clips_seen.append((indices, max_norm))
            self.pins.before_clipping()
            return
        if isinstance(total_norm, Tensor):
            total_norm = total_norm.detach()
            if total_norm.device.type == "cpu" and not math.isfinite(float(total_norm)):
                # torch now scales by 0 or NaN, and that cannot be undone.
                self._read_before_change(row)
                return
            total_norm = total_norm.clone()
        if max_norm < math.inf:
            row.clips.append((indices, total_norm, max_norm))
        self.pins.before_clipping()

    def clipping_values(self, grads: Iterable[Tensor], largest: float) -> None:
        row, _ = self._row_of(grads)
        if row is not None and self._diagnosis is not DiagnosisPhase.RUNNING:
            row.clipped = True
            row.scalars["clip_value"] = largest
            self._read_before_change(row)
            self.pins.before_clipping()

    def clipped(self, norm: Any, max_norm: float) -> None:
        """The loop says that it has clipped; ignored if torch's function was seen."""
        row = self._row_in_hand()
        if row.clipped:
            return
        row.clipped = True
        everyone = [one.index for one in self.roster.watched]
        row.clips.append((everyone, norm.detach().clone() if isinstance(norm, Tensor) else norm, max_norm))

    def loss_scaled(self, scaler: Any) -> None:
        if self._diagnosis is not DiagnosisPhase.RUNNING:
            self._scale.loss_scaled(scaler)

    def unscaled(self, optimizer: Any) -> None:
        self._scale.unscaled()

    def scaler_steps(self, scaler: Any, optimizer: Any) -> None:
        self._step_began.discard(id(innermost(optimizer)))

    def scaler_stepped(self, scaler: Any, optimizer: Any) -> None:
        inner = innermost(optimizer)
        if id(inner) not in self._step_began and any(inner is o for o in self.roster.living()):
            self._read(self._row_for(inner), inner)  # it found inf or NaN, and did not call step()
            self._stepped(inner, taken=False)

    def _row_of(self, grads: Iterable[Tensor]) -> tuple[StepRow | None, list[int]]:
        """The row these gradients belong to, and which tensors they are of; None if they are not ours."""
        wanted = {id(grad) for grad in grads}
        found = [w for w in self.roster.watched if (t := w.ref()) is not None and id(t.grad) in wanted]
        if not found:
            return None, []
        indices = [one.index for one in found]
        for optimizer in self.roster.living():
            if any(one in found for one in self.roster.owned_by(optimizer)):
                return self._row_for(optimizer), indices
        return self._row_in_hand(), indices

    def _read_before_change(self, row: StepRow) -> None:
        """Measure the gradients before clipping changes them in a way that cannot be undone."""
        if row.measured and self._scale.phase is not Scaling.SCALED:
            self._read_gradients(row, self.roster.watched, None)
        else:
            row.after_clipping = True

    @property
    def steps_seen(self) -> int:
        """Steps that the alert rules have judged."""
        return self.alerts.seen

    def _report_outside(self) -> None:
        found = self._outside.still()
        if found:
            severity = "warning" if any(one.training for one in found) else "explained"
            names = sorted({one.name for one in found})
            values = {"outside": len(found), "which": shorten(names, 3)}
            self.alerts.raise_now("not-in-optimizer", severity, values, variant="outside", step=self.step)

    def _living(self) -> list[Tensor]:
        return [tensor for one in self.roster.watched if (tensor := one.ref()) is not None]

    def _never_stepped(self) -> None:
        if any(version(t) != self._versions[id(t)] for t in self._living() if id(t) in self._versions):
            return  # another optimizer steps, as inside SAM
        values = {"backwards": self._backwards}
        self.alerts.raise_now("no-step", "fault", values, variant="never", step=self.step, lasts=False)

    def ends(self) -> None:
        """The watch is closed: gradients that no step ever took are reported."""
        if self._phase is Phase.WAITING and FEWEST_BACKWARDS <= self._backwards < NEVER_STEPPED:
            self._never_stepped()

    # The diagnosis of a gradient that is not finite.

    def _may_diagnose(self) -> bool:
        waiting = self._diagnosis is DiagnosisPhase.NOT_RUN
        return waiting and self.closure is not None and self.roster.model is not None

    def _diagnose(self) -> None:
        """Run diagnose() while the weights are still those that gave this gradient."""
        assert self.closure is not None
        self._diagnosis = DiagnosisPhase.RUNNING
        try:
            data = diagnose_now(self.roster.model, self.closure)
        finally:
            self._diagnosis = DiagnosisPhase.DONE
        self.event("report", data)
