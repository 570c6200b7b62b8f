"""A watch over sharded tensors: when its ranks send their numbers, and how a row changes by the totals.

Without a DTensor among the watched tensors nothing is exchanged: under DDP each rank has the full gradient,
already averaged, and the numbers of one rank are those of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clinometer.distributed.reduce import all_reduce
from clinometer.distributed.rendezvous import WatchRanks, any_sharded, watch_signature
from clinometer.distributed.sharded_tensors import is_distributed, is_sharded, local
from clinometer.monitoring.measure.pins import Pins
from clinometer.monitoring.measure.rank_sums import PartMeasures, StepExchange
from clinometer.monitoring.measure.statistics import flat
from clinometer.monitoring.measure.step_row import StepRow
from clinometer.monitoring.measure.watched_tensors import Roster
from clinometer.torch_internals.modules import fsdp_groups, gathered, was_gathered


class GatheredParameter:
    """A full parameter as FSDP computes with it, and its gradient before it is reduced."""

    is_leaf = True

    def __init__(self, part: Any) -> None:
        self._part = part

    @property
    def parameter(self) -> Tensor:
        return gathered(self._part)

    @property
    def sharded(self) -> Tensor:
        return self._part.sharded_param

    @property
    def grad(self) -> Tensor | None:
        # Kept in the reduction's precision elsewhere, where that is another one.
        kept = getattr(self._part, "unsharded_accumulated_grad", None)
        return gathered(self._part).grad if kept is None else kept


class Shards:
    """The exchange between the ranks of a watch; does nothing if no tensor is sharded."""

    def __init__(self, roster: Roster, every: int) -> None:
        self._roster = roster
        self._every = every
        self._ranks: WatchRanks | None = None
        self._gathered: list[GatheredParameter] | None = None
        self._closures = False
        self.backwards = 0
        """Backwards that brought sharded gradients: all ranks take part in each."""
        self.agree()

    @property
    def active(self) -> bool:
        return self._ranks is not None

    @property
    def writes(self) -> bool:
        """Whether this rank writes to the sinks."""
        return self._ranks is None or self._ranks.writes

    def agree(self) -> None:
        """Agree with the other ranks on the tensors, at the beginning and when there are more."""
        tensors = [one.ref() for one in self._roster.watched]
        if self._ranks is None and not any_sharded(tensors):
            return
        names = [type(optimizer).__name__ for optimizer in self._roster.living()]
        signature = watch_signature(self._roster.watched, self._every, names)
        self._gathered = None
        if self._ranks is None:
            self._ranks = WatchRanks(tensors, signature)
        else:
            self._ranks.grow(tensors, signature)

    def leave(self, reason: str) -> None:
        """This rank watches no longer."""
        ranks, self._ranks = self._ranks, None
        if ranks is not None and is_distributed():
            with suppress(RuntimeError):  # the process that holds the store has ended
                ranks.leave(reason)

    def gathered_parameters(self) -> list[GatheredParameter]:
        """FSDP's full parameters, as far as they exist: FSDP makes them when it first gathers."""
        if self._ranks is None:
            return []
        if self._gathered is None:
            model = self._roster.model
            parts = list(_fsdp_params(model)) if isinstance(model, nn.Module) else []
            found = [GatheredParameter(part) for part in parts if was_gathered(part)]
            if len(found) < len(parts):
                return found
            self._gathered = found
        return self._gathered

    def stand_ins(self) -> dict[int, int]:
        """id of a whole parameter in the graph → id of the one it is gathered from."""
        return {id(one.parameter): id(one.sharded) for one in self.gathered_parameters()}

    def first_square(self) -> tuple[str, Any] | None:
        """‖·‖² of the first micro-batch's gradient: of the shards, if it was reduced already ("shards"), else
        of this rank's own whole gradient ("whole"); None where neither is there."""
        ranks = self._ranks
        assert ranks is not None
        tensors = [one.ref() for one in self._roster.watched]
        grads = [
            (tensor.grad, counts)
            for tensor, counts in zip(tensors, ranks.reduction.counts_once, strict=False)
            if tensor is not None and tensor.is_leaf and tensor.grad is not None
        ]
        if any(is_sharded(grad) for grad, _ in grads):
            return "shards", sum(square_of(grad) for grad, counts in grads if counts)
        waiting = [grad for one in self.gathered_parameters() if (grad := one.grad) is not None]
        if not waiting or any(is_sharded(grad) for grad in waiting):
            return None
        return "whole", sum(square_of(grad) for grad in waiting)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank: a small reduction. False unless every rank has a closure."""
        ranks = self._ranks
        if ranks is None:
            return flag
        if not self._closures:
            return False
        on_any = torch.tensor([float(flag)])
        work = all_reduce(on_any, "max", ranks.group, wait=False)
        ranks.wait_for(work, time.monotonic())
        return bool(on_any)

    def send(self, row: StepRow, pins: Pins, closure: Callable[[], Any] | None) -> None:
        """Send what this rank measured, once a step."""
        ranks = self._ranks
        if ranks is None or row.exchange is not None or not row.measured:
            return
        row.fetch()
        if ranks.reduction.tensors != len(row.statistics):
            self.agree()
        watched = self._roster.watched[: len(row.statistics)]
        tensors = [one.ref() for one in watched]
        parts = np.array([0 if t is None else local(t).numel() for t in tensors], float)
        part = PartMeasures(
            statistics=row.statistics,
            counts=row.counts,
            numel=np.array([one.numel for one in watched], float),
            local_numel=parts,
            first_norm=np.array([one.first_norm for one in watched]),
            moved_elsewhere=np.array([one.moved_elsewhere for one in watched], bool),
            pinned=pins.numbers(ranks.reduction.counts_once),
            scalars=self._scalars(row, pins, closure),
        )
        row.exchange = StepExchange(ranks, part)

    def _scalars(self, row: StepRow, pins: Pins, closure: Any) -> dict[str, float]:
        loss = row.scalars.get("loss")
        loss = None if loss is None else float(local(loss) if isinstance(loss, Tensor) else loss)
        kind, square = row.first_square or ("", 0.0)
        return {
            "loss": loss or 0.0,
            "losses": float(loss is not None),
            "first_shards": float(square) if kind == "shards" else 0.0,
            "first_whole": float(square) if kind == "whole" else 0.0,
            "wholes": float(kind == "whole"),
            "step": float(row.step),
            "backwards": float(self.backwards),
            "pins": pins.mark(),
            "closure": float(closure is not None),
            "clips": float(len(row.clips) + len(row.clips_seen)),
            "skipped": float(not row.taken),
            "piled_up": float(row.piled_up),
            "after_clipping": float(row.after_clipping),
            "clipped_while_scaled": float(row.clipped_while_scaled),
            "clipped": float(row.clipped),
            "memory": float(row.scalars.get("memory", 0.0)),
        }

    def receive(self, row: StepRow, pins: Pins, closure: Callable[[], Any] | None) -> None:
        """The row becomes that of the full tensors, the same on every rank."""
        self.send(row, pins, closure)  # from a GPU, whose numbers have arrived by now
        if row.exchange is None:
            return
        totals = row.exchange.wait()
        row.exchange = None
        row.statistics, row.first_norm = totals.statistics, totals.first_norm
        row.moved_elsewhere = totals.moved_elsewhere
        if totals.counts is not None:
            row.counts = totals.counts
        row.taken = not totals.largest["skipped"]
        for name in ("piled_up", "after_clipping", "clipped_while_scaled", "clipped"):
            setattr(row, name, bool(totals.largest[name]))
        if totals.largest["memory"]:
            row.scalars["memory"] = totals.largest["memory"]
        summed = totals.summed
        if summed["losses"]:
            row.scalars["loss"] = summed["loss"] / summed["losses"]
        if row.first_square is not None:
            kind, _ = row.first_square
            row.first_square = (
                summed["first_whole"] / summed["wholes"] if kind == "whole" else summed["first_shards"]
            )
            row.noise_ranks = int(summed["wholes"]) or 1
        pins.agree(totals.pinned, totals.same["pins"])
        self._closures = totals.same["closure"] and closure is not None


def square_of(grad: Tensor) -> Any:
    """‖g‖² of what is here, a number on the host and a tensor on a device."""
    values = flat(grad)
    if values.device.type == "cpu":
        narrow = torch.promote_types(values.dtype, torch.float32)
        return float(torch.linalg.vector_norm(values, dtype=narrow)) ** 2
    return torch.linalg.vector_norm(values.float()).square()


def _fsdp_params(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        for group in fsdp_groups(module):
            yield from group.fsdp_params
