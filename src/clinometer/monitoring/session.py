"""What a watch knows between two steps, and how a step's numbers come together."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clinometer.gradients.ranks import refuse_flattened
from clinometer.gradients.step import innermost
from clinometer.monitoring.alerts import Alerts
from clinometer.monitoring.asking import diagnose_now
from clinometer.monitoring.chains import Chains
from clinometer.monitoring.describe import describe, order_of_use
from clinometer.monitoring.facts import Tensors, facts_of
from clinometer.monitoring.first_part import FirstPart
from clinometer.monitoring.joined import Gradients
from clinometer.monitoring.losses import Losses
from clinometer.monitoring.noise import EVERY as NOISE_EVERY
from clinometer.monitoring.outlet import Outlet
from clinometer.monitoring.pins import Pins
from clinometer.monitoring.reading import Row, refresh
from clinometer.monitoring.roster import Roster
from clinometer.monitoring.shards import Shards
from clinometer.monitoring.statistics import STATISTICS, Scratch
from clinometer.monitoring.surroundings import environment, memory_in_use
from clinometer.sharding import is_sharded, rank
from clinometer.torch_internals.kernels import scale_of

HISTOGRAMS_EVERY = 16


class Session:
    """Called by Watch, which guards it; under no_grad and without autocast."""

    def __init__(self, model: Any, optimizers: Sequence[Optimizer], outlet: Outlet, every: int) -> None:
        if isinstance(model, nn.Module):
            refuse_flattened(model.modules())
        self.roster = Roster(model, optimizers)
        self.shards = Shards(self.roster, every)
        self._first_part = FirstPart(self.roster, self.shards)
        if not self.shards.writes or (self._first_part.replicated and rank() != 0):
            outlet.sinks.clear()  # the same numbers on every rank: the first alone writes
        self.outlet = outlet
        self.every = every
        self.step = 0
        self.closure: Callable[[], Any] | None = None
        self.pins = Pins()
        self.alerts = Alerts(self.outlet.alert)
        self._losses = Losses()
        self._chains = Chains(self.roster)
        self._parts_before = 0
        self._unmeasured: set[int] = set()
        """Optimizers that have stepped since their weights were measured."""
        self._scratch, self._joined = Scratch(), Gradients()
        self._row: Row | None = None
        """The step under way, or the last one until the next begins."""
        self._whole = False
        """Nothing more is coming for the row, but what is logged."""
        self._described: list[dict[str, Any]] = []
        self._known: Tensors | None = None
        self._positions: dict[int, int] = {}
        self._last_time: float | None = None
        self._logged_first: dict[str, bool] = {}
        """For each name that is logged: whether it comes before the step it belongs to."""
        self._coming: dict[str, Any] = {}
        self._batch_coming: dict[str, Any] | None = None
        self._scaler: Callable[[], Any] = lambda: None
        self._scaling = False
        self._unscaled: set[int] = set()
        self._began: set[int] = set()
        self._asking = False
        self._diagnosed = False

    # The run as a whole.

    def begin(self, config: dict[str, Any]) -> None:
        model = self.roster.model
        name = str(config.pop("name", None) or type(model).__name__)
        run = {"name": name, "started": time.time(), "config": config, "environment": environment()}
        run |= {"statistics": list(STATISTICS), "every": self.every, "model": type(model).__name__}
        run["optimizers"] = [type(o).__name__ for o in self.roster.living()]
        self.outlet.tell("begin", run)

    def let_go(self) -> None:
        """Give the memory back, and hold nobody."""
        for one in self.roster.watched:
            one.before = one.room = None
        self._row = self.closure = None

    def leave(self, reason: str) -> None:
        """Over, for this rank: others that watch the same sharded tensors need not wait for it."""
        self.shards.leave(reason)

    def event(self, kind: str, data: dict[str, Any]) -> None:
        self.outlet.tell("event", self.step, time.time(), kind, data)

    def log(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            first = self._logged_first.setdefault(name, self._row is None)
            row = self._row
            if row is not None and (not self._whole or not (first or self._losses.parts)):
                row.scalars[name] = value
            else:
                self._coming[name] = value

    def log_batch(self, identity: dict[str, Any]) -> None:
        first = self._logged_first.setdefault("batch", self._row is None)
        row = self._row
        if row is not None and (not self._whole or not (first or self._losses.parts)):
            row.batch = identity
        else:
            self._batch_coming = identity

    # Around the optimizer's step.

    def before_step(self, optimizer: Optimizer) -> None:
        self._began.add(id(optimizer))
        row = self._row_for(optimizer)
        self._read(row, optimizer)

    def before_closure(self, optimizer: Optimizer) -> None:
        self._began.add(id(optimizer))
        self._row_for(optimizer)

    def closure_ran(self, optimizer: Optimizer) -> None:
        row = self._row
        if row is not None and not self._whole and id(optimizer) not in row.stepped:
            if id(optimizer) not in row.read_for:
                self._read(row, optimizer)
            self._losses.take()  # what later rounds say is no part of the loss

    def after_step(self, optimizer: Optimizer) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer skips by itself
        self._stepped(optimizer, taken=found_inf is None or not bool(torch.as_tensor(found_inf).any()))

    def skip(self) -> None:
        for optimizer in self.roster.living():
            self._read(self._row_for(optimizer), optimizer)
            self._stepped(optimizer, taken=False)

    def _row_for(self, optimizer: Optimizer) -> Row:
        """The row of the step under way; a new one if this optimizer had its turn in the last."""
        row = self._row
        if row is not None and not self._whole and id(optimizer) in row.stepped:
            self._close_row(row)
        if row is not None and not self._whole:
            return row
        self.flush()
        return self._open_row()

    def _open_row(self) -> Row:
        if self.roster.grew():
            self.shards.meet()
        number = self.step + 1
        measured = (number - 1) % self.every == 0
        # The same steps however often the run is stopped and resumed.
        before = number - self.every
        histograms = measured and (number - 1) // HISTOGRAMS_EVERY > (before - 1) // HISTOGRAMS_EVERY
        self.pins.forget()
        self._row = row = Row(number, self.roster.watched, measured=measured, histograms=histograms)
        self._whole = False
        row.scalars.update(self._coming)
        row.batch = self._batch_coming
        self._coming, self._batch_coming = {}, None
        return row

    def _read(self, row: Row, optimizer: Optimizer) -> None:
        first = not row.read_for
        row.piled_up |= self._chains.unbroken(optimizer)
        row.read_for.add(id(optimizer))
        row.parts = max(row.parts, self._losses.parts)
        loss = self._losses.take()
        if loss is not None:
            row.losses.append(loss)
        if not row.measured:
            return
        if self.roster.grew():
            self.shards.meet()
            row.widen(self.roster.watched)
        mine = [*self.roster.owned_by(optimizer), *(self.roster.unowned if first else ())]
        refresh(
            self.roster.owned_by(optimizer), self._joined.places, stepped=id(optimizer) in self._unmeasured
        )
        self._unmeasured.discard(id(optimizer))
        if first:  # apart, because another optimizer may be the first of the next round
            refresh(self.roster.unowned, self._joined.places)
        self._read_gradients(row, mine, getattr(optimizer, "grad_scale", None))
        self.pins.before(optimizer)
        if self._scaler() is None and self._may_ask() and self.shards.any(row.nonfinite()):
            self._ask(row)

    def _read_gradients(self, row: Row, watched: list[Any], scale: Any) -> None:
        read = row.read_gradients(watched, self.roster.living(), self._scratch, self._joined)
        if scale is not None and read:  # a fused optimizer takes the scale off by itself
            row.scales.append((read, torch.as_tensor(scale).clone()))

    def _stepped(self, optimizer: Optimizer, *, taken: bool) -> None:
        row = self._row
        if row is None or self._whole:
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
        self._chains.stepped(optimizer)
        self.step = row.step
        if all(id(o) in row.stepped for o in self.roster.living()):
            self._close_row(row)

    def _close_row(self, row: Row) -> None:
        """All is there that can be known without waiting."""
        self._whole = True
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
        scaler = self._scaler()
        if scaler is not None and (scale := scale_of(scaler)) is not None:
            row.scalars["grad_scale"] = scale.clone()
        row.first_square, row.noise_ranks = self._first_part.take()
        self._parts_before = row.parts
        self._scaling, self._unscaled = False, set()
        if row.device is None:  # what a GPU still computes is sent when it has arrived
            self.shards.send(row, self.pins, self.closure)

    def flush(self) -> None:
        """Tell the sinks the last whole step, if they do not know it yet."""
        row = self._row
        if row is None or not self._whole or row.told:
            return
        row.told = True
        if not row.measured:
            return
        self.shards.receive(row, self.pins, self.closure)
        row.finish()
        self._first_part.tell(row)
        self._describe()
        statistics = row.statistics.astype("float32")
        self.outlet.tell("step", row.step, row.time, row.scalars, statistics)
        if row.counts is not None:
            self.outlet.tell("histograms", row.step, row.counts)
        if pinned := self.pins.take(row.scalars.get("clip", 1.0)):
            self.outlet.tell("weights", row.step, pinned)
        if self._known is None or len(self._known.names) != len(row.statistics):
            self._known = Tensors.of(self.roster, self._described[: len(row.statistics)])
        self.alerts.look(facts_of(row, self.roster, self._known))

    def _describe(self) -> None:
        if len(self._described) < len(self.roster.watched):
            self._described = describe(self.roster.watched, self.roster.groups(), self._positions)
            self.outlet.tell("tensors", self._described)

    # What torch's functions say (seams.py).

    def backward_begins(self, losses: Sequence[Tensor]) -> None:
        if self._asking:
            return
        if not self._positions:
            self._positions = order_of_use(losses, self.roster.watched, self.shards.stand_ins())
        self._chains.backward_begins()
        self._losses.begins([*self.roster.tensors(), *self.shards.gathered()])

    def backward_failed(self) -> None:
        self._losses.failed()

    def backward_ended(self, losses: Sequence[Tensor], given: Any) -> None:
        if self._asking:
            return
        scaler = self._scaler()
        scale = scale_of(scaler) if scaler is not None and self._scaling else None
        tensors = self.roster.tensors()
        self._chains.backward_ended()
        if not self._losses.ended([*tensors, *self.shards.gathered()], losses, given, scale, len(tensors)):
            return
        self.shards.backwards += self._losses.reduced
        row = self._row
        if row is not None and not self._whole:
            row.read.clear()  # what was measured when values were clipped is out of date
        due = (self.step % NOISE_EVERY) == 0 and self._parts_before >= 2
        if due and self._losses.parts == 1 and self._losses.clean:
            self._first_part.measure()

    def clipping(self, grads: Iterable[Tensor], total_norm: Any, max_norm: float) -> None:
        row, indices = self._row_of(grads)
        if row is None or self._asking:
            return
        row.clipped = True
        row.clipped_while_scaled |= self._scaling and not self._unscaled
        if is_sharded(total_norm):
            # Its value is known when all ranks have told their part. Measured now, no value is needed.
            self._look_now(row)
            if max_norm < math.inf:
                row.clips_seen.append((indices, max_norm))
            self.pins.before_clipping()
            return
        if isinstance(total_norm, Tensor):
            total_norm = total_norm.detach()
            if total_norm.device.type == "cpu" and not math.isfinite(float(total_norm)):
                # torch now scales by 0 or NaN, and that cannot be taken back.
                self._look_now(row)
                return
            total_norm = total_norm.clone()
        if max_norm < math.inf:
            row.clips.append((indices, total_norm, max_norm))
        self.pins.before_clipping()

    def clipping_values(self, grads: Iterable[Tensor], largest: float) -> None:
        row, _ = self._row_of(grads)
        if row is not None and not self._asking:
            row.clipped = True
            row.scalars["clip_value"] = largest
            self._look_now(row)
            self.pins.before_clipping()

    def clipped(self, norm: Any, max_norm: float) -> None:
        row = self._row_in_hand()
        if row.clipped:
            return  # it was seen
        row.clipped = True
        everyone = [one.index for one in self.roster.watched]
        row.clips.append((everyone, norm.detach().clone() if isinstance(norm, Tensor) else norm, max_norm))

    def loss_scaled(self, scaler: Any) -> None:
        if scaler.is_enabled() and not self._asking:
            self._scaler, self._scaling = weakref.ref(scaler), True

    def unscaled(self, optimizer: Any) -> None:
        self._unscaled.add(id(innermost(optimizer)))

    def scaler_steps(self, scaler: Any, optimizer: Any) -> None:
        self._began.discard(id(innermost(optimizer)))

    def scaler_stepped(self, scaler: Any, optimizer: Any) -> None:
        inner = innermost(optimizer)
        if id(inner) not in self._began and any(inner is o for o in self.roster.living()):
            self._read(self._row_for(inner), inner)  # it found inf or NaN, and did not call step()
            self._stepped(inner, taken=False)

    def _row_of(self, grads: Iterable[Tensor]) -> tuple[Row | None, list[int]]:
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

    def _row_in_hand(self) -> Row:
        if self._row is not None and not self._whole:
            return self._row
        self.flush()
        return self._open_row()

    def _look_now(self, row: Row) -> None:
        """Measure the gradients before they are changed for good."""
        if row.measured and not (self._scaling and not self._unscaled):
            self._read_gradients(row, self.roster.watched, None)
        else:
            row.after_clipping = True

    # Alerts.

    def _may_ask(self) -> bool:
        return self.closure is not None and self.roster.model is not None and not self._diagnosed

    def _ask(self, row: Row) -> None:
        """Ask diagnose() while the weights are still those that gave this gradient."""
        model = self.roster.model
        assert self.closure is not None
        self._diagnosed = True
        self._asking = True
        try:
            data = diagnose_now(model, self.closure)
        finally:
            self._asking = False
        self.event("report", data)
