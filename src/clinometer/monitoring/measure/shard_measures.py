"""A watch over sharded tensors: when its ranks send their numbers, and what the answer changes in a step.

Nothing of this happens while no watched tensor is a DTensor: under DDP each rank holds the whole gradient,
already averaged, and one rank's numbers are right without a word.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clinometer.distributed.rendezvous import Meeting, any_sharded, told_of
from clinometer.distributed.sharded_tensors import is_distributed, is_sharded, local
from clinometer.monitoring.measure.pins import Pins
from clinometer.monitoring.measure.rank_sums import Exchange
from clinometer.monitoring.measure.statistics import flat
from clinometer.monitoring.measure.step_row import StepRow
from clinometer.monitoring.measure.watched_tensors import Roster
from clinometer.torch_internals.modules import fsdp_groups, gathered, was_gathered


class Gathered:
    """A parameter as FSDP computes with it, whole; its gradient before it is reduced."""

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
    """The sharded side of a session; idle where nothing is sharded."""

    def __init__(self, roster: Roster, every: int) -> None:
        self._roster = roster
        self._every = every
        self._meeting: Meeting | None = None
        self._gathered: list[Gathered] | None = None
        self._closures = False
        self.backwards = 0
        """Backwards that brought sharded gradients: all ranks take part in each."""
        self.meet()

    @property
    def active(self) -> bool:
        return self._meeting is not None

    @property
    def writes(self) -> bool:
        """Whether this rank tells the sinks."""
        return self._meeting is None or self._meeting.writes

    def meet(self) -> None:
        """Agree with the other ranks on the tensors, at the beginning and when there are more."""
        tensors = [one.ref() for one in self._roster.watched]
        if self._meeting is None and not any_sharded(tensors):
            return
        told = told_of(self._roster.watched, self._every, [type(o).__name__ for o in self._roster.living()])
        self._gathered = None
        if self._meeting is None:
            self._meeting = Meeting(tensors, told)
        else:
            self._meeting.grown(tensors, told)

    def leave(self, reason: str) -> None:
        """This rank watches no longer."""
        meeting, self._meeting = self._meeting, None
        if meeting is not None and is_distributed():
            with suppress(RuntimeError):  # the store's host is gone, and so is everybody who would ask
                meeting.left(reason)

    def gathered(self) -> list[Gathered]:
        """FSDP's whole parameters, as far as it has made them: it does when it first gathers."""
        if self._meeting is None:
            return []
        if self._gathered is None:
            model = self._roster.model
            parts = list(_fsdp_params(model)) if isinstance(model, nn.Module) else []
            found = [Gathered(part) for part in parts if was_gathered(part)]
            if len(found) < len(parts):
                return found
            self._gathered = found
        return self._gathered

    def stand_ins(self) -> dict[int, int]:
        """id of a whole parameter in the graph → id of the one it is gathered from."""
        return {id(one.parameter): id(one.sharded) for one in self.gathered()}

    def first_square(self) -> tuple[str, Any] | None:
        """‖·‖² of the first micro-batch's gradient: of the shards, if it was reduced already ("shards"), else
        of this rank's own whole gradient ("whole"); None where neither is there."""
        meeting = self._meeting
        assert meeting is not None
        tensors = [one.ref() for one in self._roster.watched]
        grads = [
            (tensor.grad, counts)
            for tensor, counts in zip(tensors, meeting.together.counts_once, strict=False)
            if tensor is not None and tensor.is_leaf and tensor.grad is not None
        ]
        if any(is_sharded(grad) for grad, _ in grads):
            return "shards", sum(square_of(grad) for grad, counts in grads if counts)
        waiting = [grad for one in self.gathered() if (grad := one.grad) is not None]
        if not waiting or any(is_sharded(grad) for grad in waiting):
            return None
        return "whole", sum(square_of(grad) for grad in waiting)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank, if all have a closure and so all ask; a small reduction."""
        meeting = self._meeting
        if meeting is None:
            return flag
        if not self._closures:
            return False
        import torch.distributed as dist

        told = torch.tensor([float(flag)])
        work: Any = dist.all_reduce(told, dist.ReduceOp.MAX, group=meeting.group, async_op=True)
        meeting.wait_for(work, time.monotonic())
        return bool(told)

    def send(self, row: StepRow, pins: Pins, closure: Callable[[], Any] | None) -> None:
        """Send what this rank measured; again without effect."""
        meeting = self._meeting
        if meeting is None or row.exchange is not None or not row.measured:
            return
        row.fetch()
        if meeting.together.tensors != len(row.statistics):
            self.meet()
        watched = self._roster.watched[: len(row.statistics)]
        tensors = [one.ref() for one in watched]
        parts = np.array([0 if t is None else local(t).numel() for t in tensors], float)
        row.exchange = Exchange(
            meeting,
            row.statistics,
            row.counts,
            np.array([one.numel for one in watched], float),
            parts,
            np.array([one.first_norm for one in watched]),
            np.array([one.moved_elsewhere for one in watched], bool),
            pins.numbers(meeting.together.counts_once),
            self._scalars(row, pins, closure),
        )

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
        """The row becomes that of the whole tensors, the same on every rank."""
        self.send(row, pins, closure)  # from a GPU, whose numbers have arrived by now
        if row.exchange is None:
            return
        agreed = row.exchange.wait()
        row.exchange = None
        row.statistics, row.first_norm = agreed.statistics, agreed.first_norm
        row.moved_elsewhere = agreed.moved_elsewhere
        if agreed.counts is not None:
            row.counts = agreed.counts
        row.taken = not agreed.largest["skipped"]
        for name in ("piled_up", "after_clipping", "clipped_while_scaled", "clipped"):
            setattr(row, name, bool(agreed.largest[name]))
        if agreed.largest["memory"]:
            row.scalars["memory"] = agreed.largest["memory"]
        summed = agreed.summed
        if summed["losses"]:
            row.scalars["loss"] = summed["loss"] / summed["losses"]
        if row.first_square is not None:
            kind, _ = row.first_square
            row.first_square = (
                summed["first_whole"] / summed["wholes"] if kind == "whole" else summed["first_shards"]
            )
            row.noise_ranks = int(summed["wholes"]) or 1
        pins.agree(agreed.pinned, agreed.same["pins"])
        self._closures = agreed.same["closure"] and closure is not None


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
